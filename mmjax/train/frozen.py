"""What a run does not train: in bfloat16 or float32, or with its kernels in int8 or nf4."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.nn import quantized
from mmjax.nn.paths import flatten, map_named
from mmjax.train.adapters import linear_maps
from mmjax.types import MMJaxError, nearest

FLOATS = ("bfloat16", "float32", "float16")
"""What ``model.dtype`` and ``model.param_dtype`` may be."""

KINDS = (*FLOATS, *quantized.KINDS)
"""What ``model.frozen_dtype`` may be."""

REST = "bfloat16"
"""Dtype of frozen parameters that are no kernels, where the kernels are quantised."""


def quantized_maps(
    names: Sequence[str], chosen: set[str], kind: str, patterns: Sequence[str] = ("*",)
) -> tuple[str, ...]:
    """Return the linear maps whose kernels are quantised; see ``DTypes.maps``.

    names: of all parameters. chosen: those that are trained, which stay whole. kind: what the
    others are quantised to. patterns: ``model.quantize``. Raises MMJaxError for one that matches no
    kernel, and where none is left.
    """
    kernels = [name for name in names if name.endswith(".kernel")]
    for pattern in patterns:
        if not fnmatch.filter(kernels, pattern):
            raise MMJaxError(
                f"model.quantize pattern {pattern!r} matches no kernel; kernels look like "
                f"{', '.join(kernels[:3])}{nearest(pattern, kernels)}"
            )
    some = [name for name in kernels if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    frozen = [name for name in some if name not in chosen]
    if not frozen:
        raise MMJaxError(
            f"model.frozen_dtype is {kind} and every kernel is trained; set it to bfloat16, or "
            "freeze something (train, freeze, lora.rank) that model.quantize names"
        )
    return tuple(linear_maps(frozen))


def dtype_of(name: str, leaf: Any, frozen_dtype: str) -> jnp.dtype:
    """Return the dtype that a frozen parameter is kept in."""
    if leaf.dtype in (jnp.int8, jnp.uint8) or name.endswith(".kernel_scale"):
        return leaf.dtype
    return jnp.dtype(REST if frozen_dtype in quantized.KINDS else frozen_dtype)


def count(name: str, leaf: Any) -> int:
    """Return how many of a model's parameters an array holds: two a byte of nf4, none in scales."""
    if name.endswith(".kernel_scale"):
        return 0
    return math.prod(leaf.shape) * pairs(leaf)


def sizes(*trees: nnx.State) -> dict[str, int]:
    """Return how many parameters each array of some trees holds, by name; see ``count``."""
    return {name: count(name, x) for tree in trees for name, x in flatten(tree).items()}


def pairs(leaf: Any) -> int:
    """Return how many parameters one number of an array holds: a byte of nf4 two."""
    return 2 if leaf.dtype == jnp.uint8 else 1


def cast_abstract(frozen: nnx.State, frozen_dtype: str) -> nnx.State:
    """Return abstract frozen parameters in the dtypes that they are kept in."""

    def cast(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = dtype_of(name, x, frozen_dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return map_named(cast, frozen)


def cast(frozen: nnx.State, frozen_dtype: str) -> nnx.State:
    """Return frozen parameters in the dtypes that they are kept in."""
    return map_named(lambda name, x: x.astype(dtype_of(name, x, frozen_dtype)), frozen)
