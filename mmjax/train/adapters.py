"""Which maps a run adapts, and where its adapters start."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mmjax import checkpoint_steps
from mmjax.models import opening, pretrained, registry
from mmjax.models.adapter_files import partial_adapter
from mmjax.nn.linear import LoRA
from mmjax.schema import to_dataclass
from mmjax.train.changes import last_started
from mmjax.train.settings import LoRASettings
from mmjax.types import MMJaxError


def linear_maps(names: Sequence[str]) -> list[str]:
    """Return the linear maps among dotted names of parameters, as LoRA's targets are written.

    ``decoder.layers.attn.q.kernel`` is ``attn.q``, that of a tower ``vision.attn.q``.
    """
    linear = {name.removesuffix(".kernel") for name in names if name.endswith(".kernel")}
    return sorted(name.replace("layers.", "").removeprefix("decoder.") for name in linear)


def make_lora(settings: LoRASettings, maps: Sequence[str]) -> LoRA | None:
    """Return the adapters that settings ask for among a model's linear maps; None for rank 0.

    Raises MMJaxError for a pattern that matches no map, and for numbers that cannot work.
    """
    if settings.rank == 0:
        if settings.init:
            raise MMJaxError(
                f"lora.init is {settings.init} and lora.rank is 0; set lora.rank to the adapter's "
                "rank, or leave lora.init empty"
            )
        return None
    alpha = settings.alpha
    if settings.rank < 0 or not 0 < alpha < math.inf or not 0 <= settings.dropout < 1:
        raise MMJaxError(
            f"lora.rank is {settings.rank}, lora.alpha {alpha} and lora.dropout "
            f"{settings.dropout}; rank and alpha must be finite and above 0, dropout at least 0 "
            "and below 1"
        )
    return LoRA(
        settings.rank, settings.alpha, expand(settings.targets, maps), settings.rslora,
        settings.dropout,
    )  # fmt: skip


def expand(patterns: Sequence[str], maps: Sequence[str]) -> tuple[str, ...]:
    """Return the maps that match any of some glob patterns, such as ``attn.*`` or ``head``."""
    for pattern in patterns or ("",):
        if not fnmatch.filter(maps, pattern):
            raise MMJaxError(
                f"lora target {pattern!r} matches no linear map of this model; it has "
                f"{', '.join(maps)}, and patterns such as attn.*"
            )
    return tuple(m for m in maps if any(fnmatch.fnmatchcase(m, p) for p in patterns))


def check_continues(earlier: LoRA, run: LoRA | None, where: str) -> None:
    """Raise MMJaxError unless adapters of ``earlier`` mean the same in a run; where: their path.

    The run may adapt more maps: those start fresh.
    """
    if run is None:
        raise MMJaxError(
            f"{where} holds adapters and lora.rank is 0; set lora.rank={earlier.rank} to go on "
            "with them, or merge them first: python -m convert_weights.merge"
        )
    same_scale = math.isclose(earlier.scale, run.scale, rel_tol=1e-6)
    if earlier.rank != run.rank or not same_scale or set(earlier.targets) - set(run.targets):
        raise MMJaxError(
            f"{where} holds adapters of rank {earlier.rank}, scale {earlier.scale:g}, on "
            f"{', '.join(earlier.targets)}; this run has rank {run.rank}, scale {run.scale:g}, on "
            f"{', '.join(run.targets)}. Set lora.rank={earlier.rank}, "
            f"lora.alpha={earlier.alpha:g}, lora.rslora={earlier.rslora} and targets that include "
            "those"
        )


def check_same(workdir: Path, run: LoRA | None, names: Sequence[str]) -> None:
    """Raise MMJaxError where adapters of a workdir would mean something else: at another scale.

    Its checkpoints do not tell. names: of all parameters.
    """
    run_of = last_started(workdir)
    earlier = _of_run(run_of, linear_maps(names)) if run_of and run is not None else None
    if earlier is not None:
        check_continues(earlier, run, str(workdir))


def _of_run(config: Mapping[str, Any], maps: Sequence[str]) -> LoRA | None:
    """Return the adapters of a run by its config.json; None for a run without."""
    return make_lora(to_dataclass(LoRASettings, {**config["lora"], "init": None}), maps)


def read(
    path: str, run: LoRA, family: str, config: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Read an earlier run's adapters by dotted name onto the shardings of ``wanted``.

    Raises MMJaxError where they mean something else in this run, or are not all that was trained.

    path: a PEFT folder, a model folder with adapters, or a workdir of train.py (its newest
        checkpoint). wanted: our adapters; those of maps the earlier run did not adapt are left out.
    """
    folder = Path(path)
    if (folder / checkpoint_steps.FOLDER).is_dir() or folder.parent.name == checkpoint_steps.FOLDER:
        workdir, step = checkpoint_steps.find_step(folder)
        run_of = last_started(workdir)
        if not run_of:
            raise MMJaxError(
                f"lora.init {path}: {workdir}/config.json, which tells of its adapters, is missing "
                "or damaged; copy it there, or give the model folder that the run exported"
            )
        rows = run_of["train_rows"]
        _refuse_more(path, [*run_of["train"], *(one["params"] for one in rows)], workdir / "model")
        maps = linear_maps([name.replace(".lora_a", ".kernel") for name in wanted])
        earlier = _of_run(run_of, maps)
        if earlier is None:
            raise MMJaxError(f"lora.init {path}: its run trained without adapters")
        check_continues(earlier, run, f"lora.init {path}")
        return checkpoint_steps.load_params(workdir, step, _only(earlier, wanted))
    opened = opening.open_adapters(folder, registry.family(family), config)
    beside = partial_adapter(opened.family)
    if beside is not None and (opened.folders[0] / beside.file).is_file():
        _refuse_more(path, [beside.file], "what convert_weights.to_jax makes of it and its base")
    _refuse_more(path, opened.trained, folder)
    check_continues(opened.lora, run, f"lora.init {path}")
    return pretrained.read_params(opened, _only(opened.lora, wanted))


def _refuse_more(path: str, whole: Sequence[str], start: Path | str) -> None:
    """Raise MMJaxError where more than adapters was trained: alone they are half of the model.

    start: what has all of it.
    """
    if whole:
        raise MMJaxError(
            f"lora.init {path}: {', '.join(whole)} was trained with its adapters, and lora.init "
            f"takes adapters alone; leave it empty and set model.init to {start}, which has both"
        )


def _only(lora: LoRA, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adapters of some targets."""
    return {
        name: leaf
        for name, leaf in wanted.items()
        if name.endswith((".lora_a", ".lora_b"))
        and linear_maps([name.rsplit(".", 1)[0] + ".kernel"])[0] in lora.targets
    }
