"""Parameters as matrices: what optimizers that act on rows and columns see of a kernel.

A kernel [l, d, n, h] is 36 matrices [d, n h]; its logical axes say which axes belong together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from mmjax.nn import paths

HEADS = ("heads", "kv_heads")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many of a parameter's axes are layers (0 or 1), rows and columns, in this order."""

    layers: int
    rows: int
    columns: int

    def groups(self) -> Iterator[slice]:
        """The axes of [l, rows, columns], or of [rows, columns]."""
        at = 0
        for count in (*([self.layers] if self.layers else []), self.rows, self.columns):
            yield slice(at, at + count)
            at += count

    def fold(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape as matrices."""
        return tuple(math.prod(shape[group]) for group in self.groups())


def layout_of(axes: tuple[str | None, ...] | None, ndim: int) -> Layout | None:
    """Return how a parameter with these logical axes is a matrix, or None if it is none."""
    if axes is None:
        return Layout(0, 1, 1) if ndim == 2 else None
    layers = int(axes[0] == "layers")
    counts: list[int] = []
    for before, axis in zip((None, *axes[layers:]), axes[layers:], strict=False):
        if axis == "head_dim" and before in HEADS:
            counts[-1] += 1
        else:
            counts.append(1)
    return Layout(layers, *counts) if len(counts) == 2 else None


def map_layouts(fn: Callable[[str, Layout | None], Any], tree):
    """Return the tree with ``fn(name, layout)`` for every array; masked ones stay masked."""
    return _map(lambda name, layout, _: fn(name, layout), tree)


def on_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run a transformation on parameters folded to [l, rows, columns]; others stay as they are."""

    def fold(tree):
        return _map(lambda _, way, x: x.reshape(way.fold(x.shape)) if way else x, tree)

    def init(params):
        return inner.init(fold(params))

    def update(updates, state, params=None):
        params = None if params is None else fold(params)
        out, state = inner.update(fold(updates), state, params)
        return jax.tree.map(lambda u, like: u.reshape(like.shape), out, updates), state

    return optax.GradientTransformation(init, update)


def state_spec(
    name: str, shape: tuple[int, ...], axes: tuple, like: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
    """Return how an optimizer's array lies on the mesh, given the parameter it belongs to.

    name: of the array. shape: of the array: the parameter's, folded or not, perhaps without one
    axis (a mean over rows or columns); anything else is replicated. axes, like, spec: the
    parameter's logical axes, shape and partition.
    """
    whole = tuple(spec) + (None,) * (len(like) - len(spec))
    options = [(like, whole)]
    layout = layout_of(axes, len(like))
    if layout is not None:
        joined = tuple(_join(whole[group]) for group in layout.groups())
        options.append((layout.fold(like), joined))
    for sizes, parts in options:
        if shape == sizes:
            return PartitionSpec(*parts)
    for sizes, parts in options[::-1]:
        places = range(len(sizes))
        # Of a square matrix both means have one shape: v_row has lost the last axis.
        for gone in places if "v_col" in name else reversed(places):
            if shape == sizes[:gone] + sizes[gone + 1 :]:
                return PartitionSpec(*parts[:gone], *parts[gone + 1 :])
    return PartitionSpec()


def _join(parts: tuple) -> str | tuple[str, ...] | None:
    names = [p for part in parts if part for p in ((part,) if isinstance(part, str) else part)]
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def _map(fn: Callable[[str, Layout | None, Any], Any], tree):
    """Map over arrays with their names and layouts, which stand in the metadata of variables."""

    def one(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return fn(paths.name_of(path), layout_of(None, leaf.ndim), leaf)
        axes, inside = axes_of(leaf), jax.tree.leaves(leaf)
        if not inside:  # masked
            return leaf
        made = fn(paths.name_of(path), layout_of(axes, len(axes or ())), inside[0])
        return jax.tree.unflatten(jax.tree.structure(leaf), [made])

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...] | None:
    """Return the logical axes of a parameter."""
    return variable.get_metadata().get("out_sharding")
