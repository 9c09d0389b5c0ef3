"""Tokens that a run adds to the vocabulary of the model it begins with.

A processor's options may add tokens (``processor.answer_token=True``). Tables that are too short
for them grow, and new rows begin as the mean of the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.models.api import Config, Processor
from mmjax.nn import paths
from mmjax.train import matrices
from mmjax.types import MMJaxError
from mmjax.weights.load import Each


def with_tokens(
    config: Config, processor: Processor, hf: Mapping, had: int
) -> tuple[Config, tuple[int, ...]]:
    """Return the config with room for the processor's tokens, and the ids of the new ones.

    hf: the config.json that ``config`` was read from. had: tokens of the tokenizer before the
    options of the run. Only those added since make the vocabulary grow: a tokenizer that did not
    fit before is of another model, which ``processor.check`` says.
    """
    has = len(processor.tokenizer or ())
    if has == had:
        return config, ()
    ids = processor.token_ids()
    more = {k: v for k, v in ids.items() if getattr(config, k, v) is None}
    if had <= config.vocab_size < has:
        more["vocab_size"] = ids["vocab_size"]
    config = type(config).from_hf({**hf, **more}) if more else config
    return config, tuple(range(had, has))


def check_new_tokens(tokens: tuple[int, ...], processor: Processor, tree, chosen: set[str]) -> None:
    """Raise MMJaxError where new tokens would stand for rows that nothing trains.

    tree: all parameters, abstract or real. chosen: names of the trained ones.
    """
    tables = [name for name, axis in vocabulary_axes(tree).items() if axis == 0]
    if tokens and not chosen.intersection(tables):
        words = processor.tokenizer.convert_ids_to_tokens(list(tokens))
        raise MMJaxError(
            f"{', '.join(words)} are new to model.init and {', '.join(tables)} is frozen, so "
            "nothing would be learned for them; train their rows, "
            f"train_rows=({{'params': '{tables[0]}', 'rows': 'new'}},), or begin with a model that "
            "has them"
        )


def growth_line(rows: int | None, size: int) -> dict[str, str]:
    """Return a line that tells of a vocabulary that grows from so many rows; None: it does not."""
    return {"vocabulary": f"{rows} rows grow to {size}: the others' mean"} if rows else {}


def vocabulary_axes(tree) -> dict[str, int]:
    """Return the axis of the vocabulary of each parameter that has one, by dotted name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        axes = matrices.axes_of(leaf) or () if isinstance(leaf, nnx.Variable) else ()
        if "vocab" in axes:
            found[paths.name_of(path)] = axes.index("vocab")
    return found


def shortened(
    wanted: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, int], rows: int, mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what to read of a model whose tables have ``rows`` rows, whole on every device."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return {
        name: jax.ShapeDtypeStruct(
            (*x.shape[: axes[name]], rows, *x.shape[axes[name] + 1 :]), x.dtype, sharding=whole
        )
        if name in axes
        else x
        for name, x in wanted.items()
    }


def while_loading(
    axes: Mapping[str, int], wanted: Mapping[str, jax.ShapeDtypeStruct], then: Each | None
) -> Each:
    """Return what makes a table as long as it is wanted, as soon as it is read.

    then: what happens to it after that.
    """

    def grow(name: str, value: jax.Array) -> dict[str, jax.Array]:
        if name in axes:
            value = grown(value, axes[name], wanted[name])
        return {name: value} if then is None else then(name, value)

    return grow


def grown(x: jax.Array, axis: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array with rows up to those of ``like``: the mean of those there are."""

    def longer(x):
        mean = jnp.mean(x.astype(jnp.float32), axis, keepdims=True).astype(x.dtype)
        shape = list(x.shape)
        shape[axis] = like.shape[axis] - x.shape[axis]
        return jnp.concatenate([x, jnp.broadcast_to(mean, shape)], axis)

    return jax.jit(longer, out_shardings=like.sharding)(x)
