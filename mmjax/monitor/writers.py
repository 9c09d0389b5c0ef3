"""Where scalars go: JSON lines, TensorBoard, or several places at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Writer(Protocol):
    """Takes what a run has to report; one process writes, the others hold a MultiWriter()."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write scalars by name (``train/loss``); Python, numpy and jax scalars are taken."""

    def text(self, step: int, name: str, text: str) -> None:
        """Write a piece of text, such as the configuration or a generated answer."""

    def close(self) -> None:
        """Flush and release the files; writing afterwards is an error."""


class JsonlWriter:
    """Append one JSON object a call to a file, flushed at once: ``{"step": 3, "train/loss": ..}``.

    A run that was killed leaves at most one torn line; the next writer starts on a fresh one and
    ``read_metrics`` passes over it. Not-a-number and infinities are written as strings, because
    JSON has no others.
    """

    def __init__(self, path: str | os.PathLike):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        if self._file.tell() and not _ends_with_newline(self._file):
            self._file.write(b"\n")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._write({"step": int(step)} | {k: _json_number(v) for k, v in values.items()})

    def text(self, step: int, name: str, text: str) -> None:
        self._write({"step": int(step), name: text})

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self._file.flush()


class TensorboardWriter:
    """Write TensorBoard event files into a folder, through tensorboardX."""

    def __init__(self, folder: str | os.PathLike):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(os.fspath(folder))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), int(step))
        self._writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, int(step))

    def close(self) -> None:
        self._writer.close()


class MultiWriter:
    """Pass everything on to several writers; without any, write nothing."""

    def __init__(self, writers: Sequence[Writer] = ()):
        self.writers = tuple(writers)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.scalars(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        for writer in self.writers:
            writer.text(step, name, text)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def make_writer(
    workdir: str | os.PathLike, *, tensorboard: bool = True, process: int = 0
) -> MultiWriter:
    """Write ``metrics.jsonl`` and ``tensorboard/`` under a workdir, from process 0 alone."""
    if process != 0:
        return MultiWriter()
    writers: list[Writer] = [JsonlWriter(os.path.join(workdir, "metrics.jsonl"))]
    if tensorboard:
        writers.append(TensorboardWriter(os.path.join(workdir, "tensorboard")))
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
