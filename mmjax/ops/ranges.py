"""Key ranges: every mask in mmjax is a half-open range of keys ``[k_start, k_end)`` per query.

A range costs O(t) memory where a mask costs O(t s), and a block of keys outside every range of a
block of queries need not be computed at all.
"""

import jax.numpy as jnp
from jax import Array, lax


def from_segments(segment_ids: Array) -> tuple[Array, Array]:
    """Return the key ranges of packed samples: each query sees its own sample only.

    segment_ids: int32[b, t], equal and contiguous within a sample, 0 for padding. Padding gets an
    empty range, so its attention output is exactly 0. Returns k_start, k_end int32[b, t].
    """
    t = segment_ids.shape[1]
    index = jnp.arange(t, dtype=jnp.int32)[None]
    edge = jnp.ones_like(segment_ids[:, :1], dtype=bool)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.concatenate([edge, changes], axis=1)
    last = jnp.concatenate([changes, edge], axis=1)
    start = lax.cummax(jnp.where(first, index, 0), axis=1)
    end = lax.cummin(jnp.where(last, index + 1, t), axis=1, reverse=True)
    real = segment_ids > 0
    return jnp.where(real, start, 0), jnp.where(real, end, 0)


def in_window(k_start: Array | None, b: int, t: int, window: int) -> Array:
    """Return k_start, int32[b, t], so that each query sees at most ``window`` keys, its own last.

    k_start: of the ranges so far, None for 0. Queries and keys count from the start of a row.
    """
    first = jnp.maximum(jnp.arange(t, dtype=jnp.int32) - (window - 1), 0)
    first = jnp.broadcast_to(first, (b, t))
    return first if k_start is None else jnp.maximum(k_start, first)
