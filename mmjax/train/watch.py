"""Watching the steps: every step's metrics are looked at, one step late, and logged when due.

The device never waits: while it works on a step, the host reads the metrics of the one before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mmjax.monitor.meter import Meter
from mmjax.monitor.terminal import LiveLine
from mmjax.monitor.writers import Writer
from mmjax.train.step import BadStepSettings
from mmjax.types import MMJaxError

_NAMED = 8  # records that a message names; the file has all of them


@dataclasses.dataclass(frozen=True)
class Expected:
    """A step under way: its number, its metrics on the device, the records in its rows."""

    step: int
    metrics: dict[str, jax.Array]
    records: Sequence[Sequence[tuple[str, str]]]


class StepWatch:
    """Read what the steps report; write what is due, and act on a bad step.

    bad: bad steps of the whole run, those before a restart too. last_checkpoint: called for the
    step of the newest checkpoint on disk, or None. more: called for what else is logged.
    """

    def __init__(
        self,
        settings: BadStepSettings,
        workdir: Path,
        *,
        every: int,
        writer: Writer,
        meter: Meter,
        line: LiveLine,
        source_names: Sequence[str],
        last_checkpoint: Callable[[], int | None],
        bad: int = 0,
        more: Callable[[], dict[str, float]] = dict,
    ):
        self.settings, self.every, self.bad = settings, every, bad
        self._workdir, self._writer, self._meter, self._line = workdir, writer, meter, line
        self._source_names, self._last_checkpoint = tuple(source_names), last_checkpoint
        self._more = more
        self._expected: Expected | None = None

    def expect(self, step: int, metrics: dict[str, jax.Array], records: Sequence) -> None:
        """Take the metrics of a step that was just started; ``settle`` reads them."""
        self._expected = Expected(step, metrics, records)

    def settle(self, *, last: bool = False) -> dict[str, float]:
        """Read the step that was expected; returns what was logged, if it was due.

        Raises MMJaxError for a bad step that may not be skipped.
        """
        if self._expected is None:
            return {}
        expected, self._expected = self._expected, None
        values = jax.device_get(expected.metrics)
        if values.pop("bad"):
            self._act(expected, float(values["loss"]), float(values["grad_norm"]))
        if expected.step % self.every and not last:
            return {}
        scalars = self._scalars(values) | self._more() | self._meter.report()
        self._writer.scalars(expected.step, scalars)
        self._line.update(expected.step, scalars, self._meter.eta())
        return scalars

    def _scalars(self, values: dict[str, Any]) -> dict[str, float]:
        """Name the values: ``train/loss``, ``train/loss/<source>`` where there are several, ..."""
        losses, targets = values.pop("source_loss"), values.pop("source_targets")
        scalars = {f"train/{name}": float(value) for name, value in values.items()}
        if len(self._source_names) > 1:
            for name, loss, count in zip(self._source_names, losses, targets, strict=True):
                if count:  # a batch without this source says nothing about it
                    scalars[f"train/loss/{name}"] = float(loss)
        if self.settings.action == "skip":
            scalars["train/bad_steps"] = self.bad
        return scalars

    def _act(self, expected: Expected, loss: float, norm: float) -> None:
        """List a bad step, and end the run unless it is skipped."""
        self.bad += 1
        records = [record for row in expected.records for record in row]
        what = (
            f"at step {expected.step} the loss is {loss:.6g} (allowed {self.settings.max_loss:g}) "
            f"and the gradient norm {norm:.6g}; records: {_names(records)}"
        )
        file = self._workdir / f"bad_steps{jax.process_index() or ''}.jsonl"
        row = {"step": expected.step, "loss": repr(loss), "grad_norm": repr(norm)}
        try:
            # Half a surrogate pair in an id becomes its own escape in JSON.
            with open(file, "a", encoding="utf-8", errors="backslashreplace") as out:
                out.write(json.dumps(row | {"records": records}, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk must hide no bad step
            self._line.warn(f"{file} could not be written: {error}; all records: {records}")
        if self.settings.action == "skip" and self.bad <= self.settings.limit:
            self._line.warn(f"skipped a bad step ({self.bad} of {self.settings.limit}): {what}")
            return
        newest = self._last_checkpoint()
        stands = f"step {newest}" if newest else "none was saved yet"
        tried = f" after {self.bad - 1} skipped" if self.settings.action == "skip" else ""
        raise MMJaxError(
            f"{what}. Stopped{tried}; the last good checkpoint: {stands}. All records are in "
            f"{file}. Mend or drop them, lower optim.lr or raise optim.warmup, or pass over such "
            "steps with bad_steps.action='skip'; started again, the run goes on from the checkpoint"
        )


def _names(records: Sequence[tuple[str, str]]) -> str:
    """Write records as ``source/id``, the first few of many."""
    shown = ", ".join(f"{source}/{name}" for source, name in records[:_NAMED])
    more = len(records) - _NAMED
    return shown + (f" and {more} more" if more > 0 else "")
