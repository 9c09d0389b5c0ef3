"""Training checkpoints with Orbax: parameters, optimizer and data iterator of one step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mmjax.checkpoint_failures import (
    ORBAX_LOG,
    disk_trouble,
    first_cause,
    memory_trouble,
    metrics_told,
    one_error,
    own_refusal,
)
from mmjax.checkpoint_steps import FOLDER, misfit
from mmjax.monitor.terminal import human_bytes
from mmjax.nn import paths
from mmjax.parallel import distributed
from mmjax.train.state import TrainState
from mmjax.types import MMJaxError

_PATIENCE = 24 * 3600
"""Seconds that a save may take. Orbax gives up after 20 minutes of the wall clock, and a big state
on a slow disk, or a clock that is set meanwhile, would end the run; a process that is gone is found
by its heartbeat."""


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are saved and which stay.

    every: steps between saves. keep: the newest n stay. best: a metric name such as
    ``eval/vqa/accuracy``; of the steps that were evaluated, the one where it was highest stays too.
    export: write the last parameters as a model folder when training ends.
    """

    every: int = 500
    keep: int = 2
    best: str | None = None
    export: bool = True


class CheckpointManager:
    """The checkpoints of one workdir; saving goes on in the background.

    A save that cannot be written, because the disk is full or fails, is told to ``warn`` and
    dropped; the checkpoints before it stay, and the next save is tried as if nothing had been. Of
    several processes that holds where all of them find so; one that fails alone ends the run.
    notes: what was saved beside the restored step.
    """

    def __init__(
        self,
        workdir: str | Path,
        settings: CheckpointSettings,
        *,
        about: Mapping,
        warn: Callable[[str], None] = print,
    ):
        self.settings, self.warn = settings, warn
        self.about = dict(about)
        self.notes: dict[str, Any] = {}
        self.directory = Path(workdir).absolute() / FOLDER
        self._manager = self._open()
        self._saving: tuple[int, int, Any] | None = None  # step, bytes and response of a save

    @property
    def latest(self) -> int | None:
        """The newest step, finished or being saved, or None."""
        newest = self._manager.latest
        return None if newest is None else newest.step

    def newest(self) -> int | None:
        """Wait for what is being saved; return the newest step on disk, or None."""
        self.wait()
        return self.latest

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint is to be saved after ``step`` steps."""
        return step % self.settings.every == 0 and step != self.latest

    def save(
        self,
        step: int,
        state: TrainState,
        data: Any,
        metrics: Mapping[str, float],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Start saving; returns when the arrays are copied. Call before the next batch is taken.

        data: the data iterator, stored as it stands: a restart continues with its next batch.
        notes: small JSON values to find again in ``notes`` after ``restore``.
        """
        self.wait()
        items = {"params": paths.flatten(state.params), "opt": _flat(state.opt), "data": data}
        size = sum(x.nbytes for x in jax.tree.leaves((items["params"], items["opt"])))
        ORBAX_LOG.failure = None
        try:
            response = self._manager.save_checkpointables_async(
                step,
                items,
                force=True,
                metrics=dict(metrics) or None,
                custom_metadata=self.about | {"notes": dict(notes or {})},
            )
            self._saving = (step, size, response)
        except Exception as error:
            self._saving = (step, size, error)
            if jax.process_count() == 1:  # several find it together, before the next save
                self.wait()

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was measured of a step when it was saved already: it may be the best.

        Orbax takes metrics with a step alone, and reads their file when it is opened. A file that
        cannot be written is told to ``warn``.
        """
        self.wait()
        if jax.process_index() == 0:
            file = self.directory / str(step) / "metrics" / "metrics"
            try:
                held = json.loads(file.read_bytes()) if file.is_file() else {}
                file.parent.mkdir(exist_ok=True)
                part = file.with_name("metrics.part")
                part.write_text(json.dumps({**held, **metrics}), "utf-8")
                part.replace(file)  # a kill leaves the old file or the new one
            except OSError as error:
                self.warn(f"{file}: what was measured of step {step} is not kept: {error}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"metrics of step {step}")
        self._manager.close()
        self._manager = self._open()

    def check(self) -> None:
        """Report a save that has failed, without waiting for one that is under way."""
        # Several processes have to find it at the same step, or they would wait for one another.
        if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until what is being saved is on disk, or could not be written."""
        if self._saving is None:
            return
        (step, size, response), self._saving = self._saving, None
        reasons: list[str] = []  # why this process could not write it

        def ended(seconds: float | None = None) -> bool | None:
            try:
                if isinstance(response, Exception):
                    raise response
                if ORBAX_LOG.failure is not None and seconds is not None:
                    raise ORBAX_LOG.failure
                response.result(seconds)
                self._manager.wait()
            except Exception as error:
                if (reason := disk_trouble(error) or memory_trouble(error)) is not None:
                    reasons.append(reason)
                elif seconds is None or not isinstance(error, TimeoutError):
                    raise
                else:
                    return None
            return not reasons

        told = distributed.outcomes(ended) if jax.process_count() > 1 else [ended()]
        if all(told):
            return
        who = [str(i) for i, done in enumerate(told) if done is False]
        where = f" in process {', '.join(who)} of {len(told)}" if len(told) > 1 else ""
        reason = (reasons or ["not written"])[0] + where
        if None in told:
            raise MMJaxError(
                f"step {step} ({human_bytes(size)}) could not be saved to {self.directory}/{step}: "
                f"{reason}, and the others wait for what is missing; the last good checkpoint is "
                f"{self._name(self._on_disk())}. Mend the disk or its mount there, and start all "
                "processes again: the run goes on from there"
            )
        self._drop(step, size, reason)

    def end(self) -> None:
        """Let a save under way reach the disk where an error ends the run; says that it waits.

        Of several processes one that fails alone must not wait for the others: there it is cut off.
        """
        if self._saving is None or jax.process_count() > 1:
            return
        if self._manager.is_saving_in_progress():
            self.warn(f"an error ends the run; step {self._saving[0]} is saved first")
        with contextlib.suppress(Exception):  # the error that ends the run is the one to tell
            self.wait()

    def require(self, step: int) -> None:
        """Wait for the last save; raises MMJaxError if ``step`` is not on disk afterwards."""
        if step and self.newest() != step:
            raise MMJaxError(
                f"the run ends at step {step}, which could not be saved; the last good checkpoint "
                f"in {self.directory} is {self._name(self.latest)}. Make room and start again: the "
                "run goes on from there"
            )

    def restore(self, abstract: TrainState, data: Any, step: int | None = None) -> TrainState:
        """Load a step, the newest by default, onto the shardings of ``abstract``.

        data: the fresh data iterator; it is moved to where the saved one stood. Raises MMJaxError
        where the step is of another config, and where its files cannot be read.
        """
        step = self.latest if step is None else step
        want = {"params": paths.flatten(abstract.params), "opt": _flat(abstract.opt), "data": data}
        cause = None
        try:
            with one_error():
                saved = self._manager.checkpointables_metadata(step)
                problem = misfit(saved.metadata, want)
                if not problem:
                    got = self._manager.load_checkpointables(step, want)
        except (ValueError, KeyError, OSError) as error:
            problem, cause = own_refusal(error), error
            if not problem:
                raise self._unreadable(step, error) from error
        if problem:
            raise MMJaxError(
                f"checkpoint {self.directory}/{step} does not fit this config: {problem}. Continue "
                "with the config it was trained with, or choose another --workdir"
            ) from cause
        notes = (saved.custom_metadata or {}).get("notes")
        if notes is None:  # Orbax itself goes on without them
            self.warn(
                f"checkpoint {self.directory}/{step}: _CHECKPOINT_METADATA is missing or damaged. "
                "Parameters, optimizer and data are as saved; forgotten are the bad steps so far, "
                "which are counted from 0 again, and whether an evaluation was due"
            )
        self.notes = dict(notes or {})
        params = paths.replace(abstract.params, got["params"])
        opt = _unflat(abstract.opt, got["opt"])
        count = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return TrainState(count, params, opt)

    def close(self) -> None:
        """Wait for the last save and release the workdir."""
        self.wait()
        self._manager.close()

    def _open(self) -> ocp.training.Checkpointer:
        # Each of Orbax's threads logs the traceback of a failure that comes back to us anyway.
        logging.getLogger("absl").addFilter(ORBAX_LOG)
        context = ocp.Context()
        context.asynchronous.timeout_secs = _PATIENCE
        # Compressed, numbers as random as these need the host to hold most of the state once more,
        # and several times the processor's time, for a few percent of the disk.
        context.array.saving.use_compression = False
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(self.settings.keep)]
        if self.settings.best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda m: m.get(self.settings.best, float("-inf")),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        with metrics_told(self.directory):
            return ocp.training.Checkpointer(
                self.directory,
                context=context,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,  # what a killed or failed save left behind
            )

    def _unreadable(self, step: int, error: BaseException) -> MMJaxError:
        """Say that the files of a step are damaged, and where the run can go on."""
        before = max((s for s in self._steps() if s < step), default=None)
        way = "there is none before it, so start anew with another --workdir"
        if before is not None:
            way = f"move it out of there and start again: the run goes on from step {before}"
        return MMJaxError(
            f"checkpoint {self.directory}/{step} cannot be read: files of it are missing or "
            f"damaged ({first_cause(error)}); {way}"
        )

    def _drop(self, step: int, size: int, reason: str) -> None:
        """Report a save that the disk did not take, and forget it."""
        for _ in range(2):  # closing raises the failure of the save once more
            with contextlib.suppress(Exception):
                self._manager.close()
        # The manager believes in what it was about to write and to delete. A new one looks, and
        # takes away the half-written folder, which would keep the room that the next save needs.
        self._manager = self._open()
        disk = shutil.disk_usage(self.directory)
        room = f"on the disk {human_bytes(disk.free)} of {human_bytes(disk.total)} are free"
        self.warn(
            f"step {step} ({human_bytes(size)}) could not be saved to {self.directory}/{step}: "
            f"{reason} ({room}). The last good checkpoint is {self._name(self.latest)}; training "
            "goes on and the next save is tried"
        )

    def _on_disk(self) -> int | None:
        """Return the newest finished step; the manager counts one that is being saved."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        return [int(p.name) for p in self.directory.glob("*") if p.name.isdigit()]

    def _name(self, step: int | None) -> str:
        return "none yet" if step is None else f"step {step}"


def _flat(tree) -> dict[str, Any]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _unflat(like, values: Mapping[str, Any]):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: values[jax.tree_util.keystr(path)], like
    )
