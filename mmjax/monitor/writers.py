"""Where scalars, samples and pictures go: JSON lines, TensorBoard, W&B, under the same names."""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from mmjax.types import MMJaxError


class Writer(Protocol):
    """Takes what a run has to report; one process writes, the others hold a MultiWriter()."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write scalars by name (``train/loss``); Python, numpy and jax scalars are taken."""

    def sample(self, step: int, name: str, fields: Mapping[str, str]) -> None:
        """Write texts that belong together by their names: a prompt, its targets, an answer."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write a picture, uint8[h,w,3]."""

    def close(self) -> None:
        """Flush and release the files; writing afterwards is an error."""


class JsonlWriter:
    """Append one JSON object a call to a file, flushed at once: ``{"step": 3, "train/loss": ..}``.

    A run that was killed, or a disk that was full, leaves at most one torn line; the next one is
    written on a fresh line and ``read_metrics`` passes over it. Not-a-number and infinities are
    written as strings, because JSON has no others. Pictures are not for this file,
    nor samples, which have one of their own.
    """

    def __init__(self, path: str | os.PathLike):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._torn = bool(self._file.tell()) and not _ends_with_newline(self._file)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._write({"step": int(step)} | {k: _json_number(v) for k, v in values.items()})

    def sample(self, step: int, name: str, fields: Mapping[str, str]) -> None:
        """Write nothing."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write nothing."""

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        data = ("\n" if self._torn else "").encode()
        data += (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._torn = True
        while data:  # a nearly full disk takes a part, and then raises
            data = data[self._file.write(data) :]
        self._torn = False


class TensorboardWriter:
    """Write TensorBoard event files into a folder, with tensorboardX's formats.

    Its SummaryWriter writes from a thread, which dies on a full disk and then blocks the run for
    ever; here every event is written by the caller, who gets the OSError.

    first: steps done before. What an earlier run wrote of later ones, readers let go of.
    """

    def __init__(self, folder: str | os.PathLike, first: int = 0):
        with _without_torch():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2

        os.makedirs(folder, exist_ok=True)
        self._summary, self._event = summary, event_pb2.Event
        prefix, suffix = os.path.join(folder, "events"), f".{os.getpid()}"
        self._writer = event_file_writer.EventsWriter(prefix, suffix)
        begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=first + 1, session_log=begun)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._write(step, *(self._summary.scalar(k, float(v)) for k, v in values.items()))

    def sample(self, step: int, name: str, fields: Mapping[str, str]) -> None:
        # TensorBoard reads Markdown: what is indented is shown as it stands.
        blocks = (
            f"**{key}**\n\n" + "\n".join(f"    {line}" for line in value.splitlines())
            for key, value in fields.items()
        )
        self._write(step, self._summary.text(name, "\n\n".join(blocks)))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._write(step, self._summary.image(name, pixels, dataformats="HWC"))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, *summaries: Any) -> None:
        for one in summaries:
            self._add(step=int(step), summary=one)
        self._writer.flush()

    def _add(self, **fields: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **fields))


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Import as if there were no torch, unless it is loaded already.

    tensorboardX loads it where it finds it, only to know its tensors: seconds of every start,
    hundreds of megabytes, and on a GPU a second CUDA and cuDNN beside those of JAX.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


class WandbWriter:
    """Report to Weights & Biases; a run that is continued goes on in the same W&B run.

    project: its name there. name: of the run. config: what the run was told. Steps are an axis of
    their own, ``step``, because a restarted run reports some of them again. Whatever wandb raises
    later on becomes an OSError: its own process may die under a run that goes on.
    """

    def __init__(self, folder: str | os.PathLike, project: str, name: str, config: Mapping):
        wandb = self._wandb = require_wandb(project)
        self._run = wandb.init(
            project=project, name=name, id=_run_id(Path(folder) / "wandb_id"), resume="allow",
            dir=os.fspath(folder), config=dict(config),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._log({"step": int(step)} | {k: float(v) for k, v in values.items()})

    def sample(self, step: int, name: str, fields: Mapping[str, str]) -> None:
        style = "<style>pre { white-space: pre-wrap }</style>"
        shown = (
            f"<b>{html.escape(key)}</b><pre>{html.escape(value)}</pre>"
            for key, value in fields.items()
        )
        self._log({"step": int(step), name: self._wandb.Html(style + "".join(shown))})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._log({"step": int(step), name: self._wandb.Image(pixels)})

    def close(self) -> None:
        self._call(self._run.finish)

    def _log(self, row: dict[str, Any]) -> None:
        self._call(self._run.log, row)

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:  # of many kinds, bare ones among them
            raise OSError(f"W&B: {error}") from error


def _run_id(file: Path) -> str:
    """Return the id of a workdir's W&B run, drawn once and kept in a file."""
    # A kill or a full disk may have left an empty file, and no run has an empty id.
    found = file.read_text("utf-8").strip() if file.exists() else ""
    if not found:
        found = secrets.token_hex(8)
        with contextlib.suppress(OSError):  # told by those that write all the time
            file.write_text(found, "utf-8")
    return found


def require_wandb(project: str) -> ModuleType:
    """Return wandb; raises MMJaxError, which names the setting, where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise MMJaxError(
            f"log.wandb is {project!r} and wandb is not installed: pip install 'mmjax[wandb]', or "
            "set log.wandb=None"
        ) from error
    return wandb


class MultiWriter:
    """Pass everything on to several writers; without any, write nothing.

    A writer whose disk is full must not end a run: the first trouble of each is told to ``warn``,
    what it could not write is lost, and it is tried again with the next call.
    """

    def __init__(self, writers: Sequence[Writer] = (), warn: Callable[[str], None] | None = None):
        self.writers = tuple(writers)
        self.warn = warn or (lambda text: print(text, file=sys.stderr))
        self._told: set[int] = set()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._each("scalars", step, values)

    def sample(self, step: int, name: str, fields: Mapping[str, str]) -> None:
        self._each("sample", step, name, fields)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._each("picture", step, name, pixels)

    def close(self) -> None:
        for writer in self.writers:
            with contextlib.suppress(OSError):  # told before, or nothing was left to write
                writer.close()

    def _each(self, method: str, step: int, *args: Any) -> None:
        for number, writer in enumerate(self.writers):
            try:
                getattr(writer, method)(step, *args)
            except OSError as error:
                if number not in self._told:
                    self._told.add(number)
                    self.warn(
                        f"{type(writer).__name__} could not write step {step}: {error}. Training "
                        "goes on; it writes again when there is room"
                    )


def make_writer(
    workdir: str | os.PathLike,
    *,
    tensorboard: bool = True,
    wandb: str | None = None,
    name: str = "run",
    config: Mapping[str, Any] | None = None,
    process: int = 0,
    first: int = 0,
) -> MultiWriter:
    """Write ``metrics.jsonl`` and ``tensorboard/`` under a workdir, from process 0 alone.

    wandb: a W&B project that gets the same, as the run ``name`` with ``config``. first: steps done
    before, by the run that is continued.
    """
    if process != 0:
        return MultiWriter()
    writers: list[Writer] = [JsonlWriter(os.path.join(workdir, "metrics.jsonl"))]
    if tensorboard:
        writers.append(TensorboardWriter(os.path.join(workdir, "tensorboard"), first))
    if wandb:
        writers.append(WandbWriter(workdir, wandb, name, config or {}))
    return MultiWriter(writers)


def read_metrics(path: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
    """Read a metrics.jsonl into ``name -> [(step, value), ...]``, steps rising.

    A restarted run writes the steps after its checkpoint a second time: the last value counts.
    Torn lines and text are passed over; a file that is not there reads as empty.
    """
    series: dict[str, dict[int, float]] = {}
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, KeyError, TypeError):
                continue
            for name, value in row.items():
                number = _number(value)
                if name != "step" and number is not None:
                    series.setdefault(name, {})[step] = number
    return {name: sorted(points.items()) for name, points in series.items()}


def _json_number(value: Any) -> float | int | str:
    """Turn any scalar into what JSON can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = float(value)
    if math.isnan(number):
        return "NaN"
    return number if math.isfinite(number) else ("Infinity" if number > 0 else "-Infinity")


def _number(value: Any) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
