"""How far the weights of a model are: bytes, rate and time left, on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mmjax.monitor.terminal import PLAIN_EVERY, human_time

WORTH_SHOWING = 2**28  # bytes of a model; less is read before anybody has looked


@contextlib.contextmanager
def bar(
    title: str,
    total: int,
    *,
    transient: bool = False,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Show how far ``total`` bytes are; gives the function that is told of new bytes.

    A bar in a terminal, which goes away when it is ``transient``; in a log plain lines.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(title, total, console, clock)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=transient) as progress:
        task = progress.add_task(title, total=total)
        yield lambda n: progress.advance(task, n)


@contextlib.contextmanager
def reading_bar(
    title: str, *, shown: bool = True, console: Console | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show how far the weights of a model are read; gives the ``weights.load.Reading`` of it."""
    with contextlib.ExitStack() as stack:
        advance: list[Callable[[int], None]] = []

        def tell(n: int, total: int) -> None:
            if not shown or total < WORTH_SHOWING:
                return
            if not advance:
                showing = bar(title, total, transient=True, console=console)
                advance.append(stack.enter_context(showing))
            advance[0](n)

        yield tell


def _plain_lines(
    title: str, total: int, console: Console, clock: Callable[[], float]
) -> Callable[[int], None]:
    done, start = 0, clock()
    printed = start

    def tell(n: int) -> None:
        nonlocal done, printed
        done, now = done + n, clock()
        if now - printed >= PLAIN_EVERY:
            left = human_time((now - start) / done * (total - done)) if done else "-"
            line = f"{title}  {gigabytes(done)} of {gigabytes(total)}  eta {left}"
            print(line, file=console.file, flush=True)
            printed = now

    return tell


def gigabytes(n: int) -> str:
    """Return a size as text."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1000:.1f} kB"
