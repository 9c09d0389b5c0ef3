"""The weights that a run begins with, and those that it goes on with beside its checkpoint."""

from __future__ import annotations

from collections.abc import Collection

import jax
from flax import nnx

from mmjax.models import pretrained
from mmjax.models.views import is_lora
from mmjax.monitor.transfer import reading_bar
from mmjax.nn import paths, quantized
from mmjax.train import adapters, vocabulary
from mmjax.train import state as train_state
from mmjax.train.build import Blueprint
from mmjax.train.design import Outline
from mmjax.train.settings import RunSettings
from mmjax.train.state import TrainState


def init_state(
    plan: Blueprint, settings: RunSettings, outline: Outline, mesh: jax.sharding.Mesh
) -> tuple[TrainState, nnx.State]:
    """Return (state, frozen) with the weights of ``model.init``, or random ones.

    Frozen parameters are kept in ``model.frozen_dtype``: they are never updated.
    """
    values = _values(plan, settings, outline, mesh, _every(outline))
    state = train_state.started(outline.state, outline.tx, values)
    return state, train_state.filled(outline.frozen, values)


def init_frozen(
    plan: Blueprint, settings: RunSettings, outline: Outline, mesh: jax.sharding.Mesh
) -> nnx.State:
    """Return the frozen parameters alone, as ``init_state`` does: no checkpoint holds them.

    What is trained comes from the checkpoint. It is neither read nor made here, nor are moments of
    an optimizer, so that a device never holds them twice.
    """
    values = _values(plan, settings, outline, mesh, paths.flatten(outline.frozen))
    return train_state.filled(outline.frozen, values)


def _every(outline: Outline) -> dict[str, jax.ShapeDtypeStruct]:
    return {**paths.flatten(outline.state.params), **paths.flatten(outline.frozen)}


def _values(
    plan: Blueprint,
    settings: RunSettings,
    outline: Outline,
    mesh: jax.sharding.Mesh,
    names: Collection[str],
) -> dict[str, jax.Array]:
    """Read the parameters of some names, or draw those that no file has."""
    every, earlier, values = _every(outline), {}, {}
    if plan.lora_init and any(map(is_lora, names)):  # first: they are small and may not fit
        earlier = adapters.read(plan.lora_init, plan.lora, plan.family, plan.config, every)
    if plan.source is not None and names:
        wanted, each, kept = every, None, settings.model.frozen_dtype
        if kept in quantized.KINDS:
            wanted, each = quantized.while_loading(outline.frozen, every, settings.model.dtype)
        read = wanted
        if plan.source_rows is not None:
            axes = vocabulary.vocabulary_axes((outline.state.params, outline.frozen))
            read = vocabulary.shortened(wanted, axes, plan.source_rows, mesh)
            each = vocabulary.while_loading(axes, wanted, each)
        with reading_bar("reading the weights", shown=jax.process_index() == 0) as progress:
            values = pretrained.read_params(
                plan.source, read, only=names, progress=progress, each=each
            )
    values |= {name: x for name, x in earlier.items() if name in names}
    # What neither the model nor the earlier run has, such as adapters and untrained parts.
    return values | train_state.drawn(plan.make, {n: every[n] for n in names if n not in values})
