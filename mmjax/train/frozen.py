"""What a run does not train: kept in bfloat16 or float32, or with its kernels in int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.nn.paths import map_named
from mmjax.train.adapters import linear_maps
from mmjax.types import MMJaxError

INT8 = "int8"
REST = "bfloat16"
"""Dtype of frozen parameters that are no kernels, where the kernels are int8."""


def int8_maps(names: Sequence[str], chosen: set[str]) -> tuple[str, ...]:
    """Return the linear maps whose kernels are not trained; see ``DTypes.maps``.

    names: of all parameters. chosen: those that are trained. Raises MMJaxError without any.
    """
    frozen = [name for name in names if name.endswith(".kernel") and name not in chosen]
    if not frozen:
        raise MMJaxError(
            "model.frozen_dtype is int8 and every kernel is trained; set it to bfloat16, or freeze "
            "something (train, freeze, lora.rank)"
        )
    return tuple(linear_maps(frozen))


def dtype_of(name: str, leaf: Any, frozen_dtype: str) -> jnp.dtype:
    """Return the dtype that a frozen parameter is kept in."""
    if leaf.dtype == jnp.int8 or name.endswith(".kernel_scale"):
        return leaf.dtype
    return jnp.dtype(REST if frozen_dtype == INT8 else frozen_dtype)


def cast_abstract(frozen: nnx.State, frozen_dtype: str) -> nnx.State:
    """Return abstract frozen parameters in the dtypes that they are kept in."""

    def cast(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = dtype_of(name, x, frozen_dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return map_named(cast, frozen)


def cast(frozen: nnx.State, frozen_dtype: str) -> nnx.State:
    """Return frozen parameters in the dtypes that they are kept in."""
    return map_named(lambda name, x: x.astype(dtype_of(name, x, frozen_dtype)), frozen)
