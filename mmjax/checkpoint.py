"""Training checkpoints with Orbax: parameters, optimizer and data iterator of one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mmjax.nn import paths
from mmjax.train.state import TrainState
from mmjax.types import MMJaxError

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are saved and which stay.

    every: steps between saves. keep: the newest n stay. best: a metric name such as
    ``eval/vqa/accuracy``; the checkpoint where it was highest stays too. export: write the last
    parameters as a model folder when training ends.
    """

    every: int = 500
    keep: int = 2
    best: str | None = None
    export: bool = True


class Checkpoints:
    """The checkpoints of one workdir; saving goes on in the background."""

    def __init__(self, workdir: str | Path, settings: CheckpointSettings, *, about: Mapping):
        self.settings = settings
        self.about = dict(about)
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(settings.keep)]
        if settings.best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda m: m.get(settings.best, float("-inf")),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self.directory = Path(workdir).absolute() / FOLDER
        self._manager = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,  # what a killed save left behind
        )

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        newest = self._manager.latest
        return None if newest is None else newest.step

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint is to be saved after ``step`` steps."""
        return step % self.settings.every == 0 and step != self.latest

    def save(self, step: int, state: TrainState, data: Any, metrics: Mapping[str, float]) -> None:
        """Start saving; returns when the arrays are copied. Call before the next batch is taken.

        data: the data iterator, stored as it stands: a restart continues with its next batch.
        """
        items = {"params": paths.flatten(state.params), "opt": _flat(state.opt), "data": data}
        self._manager.save_checkpointables_async(
            step, items, force=True, metrics=dict(metrics) or None, custom_metadata=self.about
        )

    def restore(self, abstract: TrainState, data: Any, step: int | None = None) -> TrainState:
        """Load a step, the newest by default, onto the shardings of ``abstract``.

        data: the fresh data iterator; it is moved to where the saved one stood.
        """
        step = self.latest if step is None else step
        want = {"params": paths.flatten(abstract.params), "opt": _flat(abstract.opt), "data": data}
        try:
            got = self._manager.load_checkpointables(step, want)
        except (ValueError, KeyError) as error:
            raise MMJaxError(
                f"checkpoint {self.directory}/{step} does not fit this config: {error}. Continue "
                "with the config it was trained with, or choose another --workdir"
            ) from error
        params = paths.replace(abstract.params, got["params"])
        opt = _unflat(abstract.opt, got["opt"])
        count = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return TrainState(count, params, opt)

    def wait(self) -> None:
        """Wait until what is being saved is on disk."""
        self._manager.wait()

    def close(self) -> None:
        """Wait for the last save and release the workdir."""
        self._manager.close()


def _flat(tree) -> dict[str, Any]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _unflat(like, values: Mapping[str, Any]):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: values[jax.tree_util.keystr(path)], like
    )


def find_step(path: str | Path, best: str | None = None) -> tuple[Path, int]:
    """Return (workdir, step) of a workdir's checkpoint: the best by a metric, else the newest.

    path: a workdir, or one step's folder in it. Raises MMJaxError when there is none.
    """
    path = Path(path).absolute()
    if path.name.isdigit() and path.parent.name == FOLDER:
        return path.parent.parent, int(path.name)
    folder = path / FOLDER
    found = ocp.training.Checkpointer(folder).checkpoints if folder.is_dir() else ()
    if not found:
        raise MMJaxError(
            f"{path} holds no finished checkpoint (looked for {folder}/<step>); give a workdir "
            "of train.py, one of its checkpoints, or a model folder"
        )
    if best:
        scored = [c for c in found if c.metrics and best in c.metrics]
        if scored:
            return path, max(scored, key=lambda c: c.metrics[best]).step
    return path, max(c.step for c in found)


def load_params(workdir: Path, step: int, abstract: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Load a step's parameters alone, by dotted name, onto the shardings of ``abstract``."""
    manager = ocp.training.Checkpointer(Path(workdir).absolute() / FOLDER)
    try:
        return manager.load_checkpointables(step, {"params": dict(abstract)})["params"]
    except (ValueError, KeyError) as error:
        raise MMJaxError(
            f"checkpoint {step} of {workdir} does not fit the model: {error}"
        ) from error
    finally:
        manager.close()
