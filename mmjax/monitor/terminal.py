"""What a person sees while a run goes on: the start-up table, a live line, progress bars."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_EVERY = 10.0  # seconds between plain lines, so that a log file stays readable
_BAR = 16  # columns of the bar before the live line, where the terminal has room for both


def human(value: float | None, unit: str = "") -> str:
    """Write a number short: 12.3k, 1.25M; a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:  # three digits of less would be 1e+03 of the unit below
            return f"{value / limit:.3g}{suffix}{unit}"
    return f"{value:.3g}{unit}"


def human_bytes(count: float) -> str:
    """Write a number of bytes in KiB, MiB, GiB or TiB."""
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if suffix == "B" else f"{count:.1f} {suffix}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_time(seconds: float | None) -> str:
    """Write seconds as 42s, 3:05, 1:02:03 or 2d 03:04."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    total = round(seconds)
    days, rest = divmod(total, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    if hours:
        return f"{hours}:{minutes:02}:{secs:02}"
    return f"{minutes}:{secs:02}" if minutes else f"{secs}s"


def startup_table(
    mesh_shape: Mapping[str, int],
    rows: Sequence[tuple[str, int, int, float]],
    extras: Mapping[str, Any] | None = None,
) -> RenderableType:
    """Lay out how a run starts: mesh, parameters by part, and facts worth a line each.

    rows: (part, trainable parameters, all parameters, bytes per device).
    """
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", show_footer=len(rows) > 1)
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    sums = [sum(c) for c in columns[1:]]
    table.add_column("part", "total")
    table.add_column("trainable", f"{sums[0]:,}", justify="right")
    table.add_column("parameters", f"{sums[1]:,}", justify="right")
    table.add_column("per device", human_bytes(sums[2]), justify="right")
    for part, trainable, total, size in rows:
        shown = Text("frozen", style="dim") if total and not trainable else f"{trainable:,}"
        table.add_row(part, shown, f"{total:,}", human_bytes(size))
    facts = Table.grid(padding=(0, 2))
    mesh = " x ".join(f"{name} {size}" for name, size in mesh_shape.items())
    for name, value in {"mesh": mesh, **(extras or {})}.items():
        facts.add_row(Text(f" {name}", style="bold"), Text(str(value)))
    return Group(facts, table)


class _Pipe(Console):
    """A console that raises where the reader of a pipe has gone; rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class LiveLine:
    """Show the state of a training run: one live line on a terminal, plain lines elsewhere.

    enabled: False on every process but the first. alone: False where other processes may print to
    the same terminal; a line that is drawn anew would mix with theirs.
    What cannot be written, to a full disk or a terminal that is closed, is lost and ends no run.
    reader_gone: called where the reader of a pipe has ended.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        enabled: bool = True,
        alone: bool = True,
        console: Console | None = None,
        plain_every: float = PLAIN_EVERY,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.enabled = total_steps, enabled
        self.console = console or _Pipe()
        self.reader_gone: Callable[[], None] = lambda: None
        self._plain_every, self._clock = plain_every, clock
        self._printed_at: float | None = None
        self._last: tuple[int, str] | None = None
        self._live: Live | None = None
        if enabled and alone and self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=False)
            with self._telling():
                self._live.start()

    def update(self, step: int, values: Mapping[str, float], eta: float | None = None) -> None:
        """Show the newest scalars, by their metric names (``train/loss``, ``perf/tok_s``)."""
        if not self.enabled:
            return
        line = status_line(step, self.total_steps, values, eta)
        if self._live is not None:
            with self._telling():
                self._live.update(self._bar(step, line))
            return
        now, self._last = self._clock(), (step, line)
        due = self._printed_at is None or now - self._printed_at >= self._plain_every
        if due or step >= self.total_steps:
            self._print_last(now)

    def print(self, *what: RenderableType) -> None:
        """Print above the live line (an evaluation's table, a warning); text as it stands."""
        if self.enabled:
            shown = [Text(one) if isinstance(one, str) else one for one in what]
            with self._telling():
                self.console.print(*shown, soft_wrap=all(isinstance(one, Text) for one in shown))

    def warn(self, text: str) -> None:
        """Print a warning above the live line, from any process, on one line for a log file."""
        with self._telling():
            self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            with self._telling():
                self._live.stop()
        elif self._last is not None:
            self._print_last(self._clock())

    def _print_last(self, now: float) -> None:
        assert self._last is not None
        with self._telling():
            print(self._last[1], file=self.console.file, flush=True)
        self._printed_at, self._last = now, None

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Write within the block; what cannot be written is lost."""
        try:
            yield
        except BrokenPipeError:
            self.reader_gone()
        except OSError:  # a full disk, or a terminal that is closed
            pass

    def _bar(self, step: int, line: str) -> RenderableType:
        text = Text(line, no_wrap=True, overflow="ellipsis")
        if len(line) + _BAR + 1 > self.console.width:
            return text
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(self.total_steps, 1), completed=step, width=_BAR)
        grid.add_row(bar, text)
        return grid


def status_line(
    step: int, total: int, values: Mapping[str, float], eta: float | None = None
) -> str:
    """Write step, ETA, loss, lr, gradient norm, tokens/s, MFU and data wait in one line.

    A narrow terminal cuts its end off, so that what is looked for most stands first.
    """
    parts = [f"step {step}/{total}", f"eta {human_time(eta)}"]
    for label, name, form in (
        ("loss", "train/loss", "{:.4f}"),
        ("lr", "train/lr", "{:.2e}"),
        ("grad", "train/grad_norm", "{:.3g}"),
    ):
        if name in values:
            parts.append(f"{label} {form.format(float(values[name]))}")
    if "perf/tok_s" in values:
        parts.append(f"{human(values['perf/tok_s'])} tok/s")
    mfu = values.get("perf/mfu")
    parts.append("mfu -" if mfu is None else f"mfu {mfu:.1%}")
    if "perf/data_wait_s" in values:
        step_s = values.get("perf/step_s", 0.0)
        share = values["perf/data_wait_s"] / step_s if step_s else 0.0
        parts.append(f"data wait {share:.0%}")
    return "  ".join(parts)


def track(
    items: Iterable[Any],
    total: int,
    label: str,
    *,
    size: Callable[[Any], int] = lambda item: 1,
    enabled: bool = True,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Any]:
    """Yield items under a progress bar with ETA; plain lines where there is no terminal.

    size: how far one item moves the bar towards ``total``.
    """
    console = console or Console()
    if not enabled:
        yield from items
        return
    if console.is_terminal:
        yield from _track_live(items, total, label, size, console)
        return
    start = printed = clock()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = clock()
        if now - printed >= PLAIN_EVERY:
            left = (now - start) / done * (total - done) if done else None
            message = f"{label}  {done}/{total}  eta {human_time(left)}"
            print(message, file=console.file, flush=True)
            printed = now


def _track_live(
    items: Iterable[Any], total: int, label: str, size: Callable[[Any], int], console: Console
) -> Iterator[Any]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.advance(task, size(item))
