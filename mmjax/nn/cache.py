"""The key-value cache of a decoder: one stacked buffer, carried through layers and steps."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer.

    k, v: [l, b, s, k, h]. length: int32[b], how many keys of a row are filled. Rows are filled
    from 0; what lies beyond ``length`` is never attended to.
    """

    k: Array
    v: Array
    length: Array

    @classmethod
    def empty(cls, layers: int, b: int, s: int, heads: int, h: int, dtype) -> "Cache":
        buffer = jnp.zeros((layers, b, s, heads, h), dtype)
        return cls(buffer, buffer, jnp.zeros((b,), jnp.int32))


def write(buffer: Array, layer: Array, at: Array | None, new: Array) -> Array:
    """Write new keys or values [b, t, k, h] of one layer into the stacked buffer.

    at: int32[b], the first place of each row; None writes every row at 0 (a prefill).
    """
    if at is None:
        return jax.lax.dynamic_update_slice(
            buffer, new[None].astype(buffer.dtype), (layer,) + (0,) * 4
        )
    if new.shape[1] != 1:
        raise ValueError(
            f"a cache is filled at per-row places one token at a time, got {new.shape[1]}"
        )
    for row in range(new.shape[0]):  # updates in place, where a scatter would be serialised anyway
        piece = new[row][None, None].astype(buffer.dtype)
        buffer = jax.lax.dynamic_update_slice(buffer, piece, (layer, row, at[row], 0, 0))
    return buffer
