"""The checkpoints of a workdir: which there are, and the parameters of one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mmjax.checkpoint_failures import ORBAX_LOG, first_cause, metrics_told, one_error
from mmjax.types import MMJaxError

FOLDER = "checkpoints"
_NAMED = 3  # differences that a message names


def is_step(path: Path) -> bool:
    """Tell whether a path is one checkpoint's, WORKDIR/checkpoints/STEP, be it there or not."""
    return path.name.isdigit() and path.parent.name == FOLDER


def find_step(path: str | Path, best: str | None = None) -> tuple[Path, int]:
    """Return (workdir, step) of a workdir's checkpoint: the best by a metric, else the newest.

    path: a workdir, or one step's folder in it. Raises MMJaxError when there is none.
    """
    path = Path(path).absolute()
    if is_step(path):
        return path.parent.parent, int(path.name)
    folder = path / FOLDER
    found = []
    if folder.is_dir():
        with metrics_told(folder), ocp.training.Checkpointer(folder) as manager:
            found = manager.checkpoints
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
    """Load a step's parameters alone, by dotted name, onto the shardings of ``abstract``.

    Raises MMJaxError for those of another model, and for a step that cannot be read or is gone: the
    run it belongs to may go on meanwhile.
    """
    logging.getLogger("absl").addFilter(ORBAX_LOG)
    want, folder = {"params": dict(abstract)}, Path(workdir).absolute() / FOLDER
    try:
        with ocp.training.Checkpointer(folder) as manager, one_error():
            problem = misfit(manager.checkpointables_metadata(step).metadata, want)
            if not problem:
                return manager.load_checkpointables(step, want)["params"]
    except (ValueError, KeyError, OSError) as error:
        why = "is gone: its run keeps the newest alone (checkpoint.keep) and has removed it"
        if (folder / str(step)).is_dir():
            why = "cannot be read: files of it are missing, damaged, or being removed "
            why += f"({first_cause(error)})"
        fix = "give another, or the workdir, once more, for its newest"
        raise MMJaxError(f"checkpoint {step} of {workdir} {why}; {fix}") from error
    raise MMJaxError(f"checkpoint {step} of {workdir} does not fit the model: {problem}")


def misfit(held: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    """Say how what a checkpoint holds differs from what is wanted; empty where it does not.

    Both by item, ``params`` and ``opt``, and by name: anything that has a shape.
    """
    for item, what in (("params", "trained"), ("opt", "of the optimizer")):
        if not held.get(item) or item not in want:
            continue
        there, here = ({n: tuple(x.shape) for n, x in d[item].items()} for d in (held, want))
        found = [f"{n} is {what} there and not here" for n in there if n not in here]
        found += [f"{n} is {what} here and not there" for n in here if n not in there]
        found += [
            f"{n} is {there[n]} there and {shape} here"
            for n, shape in here.items()
            if there.get(n, shape) != shape
        ]
        if found:
            more = len(found) - _NAMED
            return "; ".join(found[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return ""
