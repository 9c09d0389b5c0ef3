"""Tables of the vocabulary of which some rows are trained, and all others stay as they are.

A model that learns new tokens inside a frozen language model trains their rows of the embedding
alone. The table is a trained parameter like any other; what is not chosen of its gradient is zero
before norm, clipping and optimizer see it, and every update leaves those rows bit for bit.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.data.tokenize import token_id
from mmjax.models.api import Processor
from mmjax.nn import paths
from mmjax.train import matrices
from mmjax.types import MMJaxError, nearest


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """Some rows of a table of the vocabulary, and no others of it, are trained.

    params: a glob pattern of parameters, such as ``decoder.embed.embedding``. rows: token ids,
    tokens as the tokenizer spells them (``<image>``) or special tokens by their name in config.json
    (``media`` is that of ``media_token_id``); ``new`` for those of the tokens that
    ``model.processor`` adds to what ``model.init`` has.
    """

    params: str
    rows: Literal["new"] | tuple[int | str, ...] = "new"


@dataclasses.dataclass(frozen=True)
class Rows:
    """The trained rows of one table. axis: of the vocabulary. ids: numbers of the rows."""

    axis: int
    ids: tuple[int, ...]

    def of(self, x: Array) -> Array:
        """Return bool, True at the trained rows, with axes that broadcast to those of x."""
        chosen = jnp.zeros(x.shape[self.axis], bool).at[jnp.array(self.ids)].set(True)
        return chosen.reshape([-1 if i == self.axis else 1 for i in range(x.ndim)])


def resolve(
    settings: Sequence[RowSettings], params: nnx.State, processor: Processor, new: Sequence[int]
) -> dict[str, Rows]:
    """Return the trained rows of each table by its dotted name.

    params: the trained parameters, abstract or real. new: rows of tokens that the run adds.
    Raises MMJaxError for a parameter without a vocabulary, an unknown token, and a row that the
    table lacks.
    """
    found: dict[str, Rows] = {}
    for one in settings:
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda x: isinstance(x, nnx.Variable)
        ):
            name = paths.name_of(path)
            if not fnmatch.fnmatchcase(name, one.params):
                continue
            axes = matrices.axes_of(leaf) or ()
            if "vocab" not in axes:
                raise MMJaxError(
                    f"train_rows: {name} is no table of the vocabulary, so it has no rows of "
                    "tokens; train all of it with train"
                )
            axis = axes.index("vocab")
            ids = _ids(one, processor, new, leaf.shape[axis], name)
            earlier = found[name].ids if name in found else ()
            found[name] = Rows(axis, tuple(sorted({*earlier, *ids})))
    return found


def masked(rows: Mapping[str, Rows], grads):
    """Return gradients that are zero outside the trained rows."""
    return _map(rows, lambda one, g: jnp.where(one.of(g), g, 0), grads)


def restored(rows: Mapping[str, Rows], new, old):
    """Return new parameters, with what is outside the trained rows as it was."""
    return _map(rows, lambda one, a, b: jnp.where(one.of(a), a, b), new, old)


def count(rows: Mapping[str, Rows], name: str, shape: Sequence[int]) -> int:
    """Return how many numbers of a trained parameter are updated."""
    size = 1
    for axis, length in enumerate(shape):
        size *= len(rows[name].ids) if name in rows and axis == rows[name].axis else length
    return size


def describe(rows: Mapping[str, Rows], processor: Processor) -> dict[str, str]:
    """Return a line for the start-up table for each table: its trained rows by token."""
    lines = {}
    for name, one in rows.items():
        tokens = processor.tokenizer.convert_ids_to_tokens(list(one.ids[:8]))
        shown = ", ".join(f"{i} {token}" for i, token in zip(one.ids, tokens, strict=False))
        more = len(one.ids) - 8
        lines[f"rows of {name}"] = shown + (f" and {more} more" if more > 0 else "")
    return lines


def _map(rows: Mapping[str, Rows], fn, tree, *rest):
    """Map ``fn(rows, leaf, ...)`` over the tables that have trained rows."""

    def one(path, leaf, *others):
        name = paths.name_of(path)
        return fn(rows[name], leaf, *others) if name in rows else leaf

    return jax.tree_util.tree_map_with_path(one, tree, *rest) if rows else tree


def _ids(
    one: RowSettings, processor: Processor, new: Sequence[int], length: int, name: str
) -> list[int]:
    """Return the row numbers that a setting means."""
    if one.rows == "new":
        if not new:
            raise MMJaxError(
                f"train_rows: rows='new' for {name}, and model.processor adds no token to those of "
                "model.init; name the tokens, such as rows=('<image>',)"
            )
        return list(new)
    if not one.rows:
        raise MMJaxError(f"train_rows: no rows for {name}; name tokens, or leave it out")
    ids = [_id(row, processor) for row in one.rows]
    if wrong := [i for i in ids if not 0 <= i < length]:
        raise MMJaxError(f"train_rows: {name} has {length} rows and no row {wrong[0]}")
    return ids


def _id(row: int | str, processor: Processor) -> int:
    if isinstance(row, int):
        return row
    special: dict[str, Any] = {
        key.removesuffix("_token_id"): value
        for key, value in processor.token_ids().items()
        if key.endswith("_token_id")
    }
    found = special.get(row)
    found = token_id(processor.tokenizer, row) if found is None else found
    if found is None:
        known = [*special, *processor.tokenizer.get_added_vocab()]
        raise MMJaxError(
            f"train_rows: {row!r} is no token of the processor{nearest(row, known)}; it has the "
            f"special tokens {', '.join(known)}"
        )
    return found
