"""What a run tells before it begins: mesh, shapes, and which part of the model is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from rich.console import Console

from mmjax.monitor.terminal import startup_table
from mmjax.nn import paths
from mmjax.train import frozen as frozen_part
from mmjax.train import rows as trained_rows
from mmjax.train.optim import OptimSettings
from mmjax.train.settings import RunSettings

if TYPE_CHECKING:
    from mmjax.train.design import Design


def print_startup(mesh, design: Design, workdir: Path) -> None:
    """Print what is about to run: mesh, parameters by part, shapes, and what the design tells."""
    settings, data = design.settings, design.settings.data
    facts = {
        "run": f"{settings.name} in {workdir}",
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "batch": f"{data.batch_size} rows x {data.seq_len} tokens, {settings.steps} steps",
        "compute": f"{settings.model.dtype}, trained parameters {settings.model.param_dtype}",
        **design.told,
    }
    rows = part_rows(design.outline.state, design.outline.frozen, settings, design.rows)
    Console().print(startup_table(dict(mesh.shape), rows, facts))


def rate_lines(own: Mapping[str, Sequence[str]], settings: OptimSettings, params) -> dict[str, str]:
    """Return a line that tells learning rates, where parameters have other peaks than ``lr``.

    own: the parameters of each pattern of ``optim.rates``. params: the trained ones, abstract.
    """
    if not own:
        return {}
    sizes = {name: math.prod(x.shape) for name, x in paths.flatten(params).items()}
    parts = [
        f"{one.lr:g} for {one.params} ({sum(sizes[name] for name in own[one.params]):,} parameters)"
        for one in settings.rates
    ]
    return {"learning rate": ", ".join([f"{settings.lr:g}", *parts])}


def part_rows(
    abstract, frozen, settings: RunSettings, rows: Mapping[str, trained_rows.Rows]
) -> list[tuple[str, int, int, int]]:
    """Return (part, trained, total, bytes on a device) for the table at the start."""
    trained, rest = paths.flatten(abstract.params), paths.flatten(frozen)
    parts: dict[str, list[int]] = {}
    for name, leaf in {**trained, **rest}.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("decoder.") else name.split(".")[0]
        row = parts.setdefault(part, [0, 0, 0])
        itemsize = leaf.dtype.itemsize
        if name in trained:
            row[0] += trained_rows.count(rows, name, leaf.shape)
        else:
            itemsize = frozen_part.dtype_of(name, leaf, settings.model.frozen_dtype).itemsize
        row[1] += frozen_part.count(name, leaf)
        row[2] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize
    optimizer = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract.opt)
    )
    return [(k, *v) for k, v in parts.items()] + [("optimizer", 0, 0, optimizer)]
