"""The key-value cache of a decoder: one stacked buffer, carried through layers and steps."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer.

    k, v: [l, b, k, s, h], heads before length, as ``mmjax.ops.decode`` reads them.
    length: int32[b], how many keys of a row are filled. Rows are filled from 0; what lies beyond
    ``length`` is never attended to. Unstacked, k and v are tuples of l buffers [1, b, k, s, h].
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    length: Array

    @classmethod
    def empty(cls, layers: int, b: int, s: int, heads: int, h: int, dtype) -> "Cache":
        """Return a cache for b rows of s keys with nothing in it."""
        shape = (layers, b, heads, s, h)
        zeros = jnp.zeros((b,), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zeros)

    def unstack(self) -> "Cache":
        """Return the cache with a buffer for each layer."""
        k, v = (tuple(x[i : i + 1] for i in range(x.shape[0])) for x in (self.k, self.v))
        return Cache(k, v, self.length)

    def take(self, rows: Array) -> "Cache":
        """Return the cache of ``rows``, int32[b'], stacked or not; a row may come several times."""
        k, v = jax.tree.map(lambda x: x.at[:, rows].get(mode="promise_in_bounds"), (self.k, self.v))
        return Cache(k, v, self.length[rows])


def write(buffer: Array, layer: Array, at: Array | None, new: Array) -> Array:
    """Write new keys or values of one layer, [b, t, k, h], into the stacked buffer.

    at: int32[b], the place in each row of its one new key; None writes t keys from 0 (a prefill).
    """
    new = new.swapaxes(1, 2).astype(buffer.dtype)
    if at is None:
        return jax.lax.dynamic_update_slice(buffer, new[None], (layer, 0, 0, 0, 0))
    if new.shape[2] != 1:
        raise ValueError(f"decoding writes one key a row, got {new.shape[2]}")
    # One scatter of single heads: XLA's CPU backend would turn fewer, larger updates into dynamic
    # slices, and copy the buffer for each of them.
    rows, heads = jnp.arange(new.shape[0])[:, None], jnp.arange(new.shape[1])
    to = buffer.at[layer, rows, heads, at[:, None]]
    return to.set(new[:, :, 0], mode="promise_in_bounds")
