"""The key-value cache of a decoder: one stacked buffer, carried through layers and steps."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.nn import int8
from mmjax.parallel.sharding import several_devices

DTYPES = ("float32", "bfloat16", "float16", "int8")
"""What a cache can be asked to store. int8 takes h + 4 bytes of a head's key, float32 4 h."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer.

    k, v: [l, b, k, s, h], heads before length, as ``mmjax.ops.decode`` reads them.
    length: int32[b], how many keys of a row are filled. Rows are filled from 0; what lies beyond
    ``length`` is never attended to. Unstacked, k and v are tuples of l buffers [1, b, k, s, h].
    k_scale, v_scale: float32[l, b, k, s], or tuples of l [1, b, k, s], of an int8 cache: k and v
    then count steps, and a head's key is its steps times its scale; else None.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    length: Array
    k_scale: Array | tuple[Array, ...] | None = None
    v_scale: Array | tuple[Array, ...] | None = None

    @classmethod
    def empty(cls, layers: int, b: int, s: int, heads: int, h: int, dtype) -> "Cache":
        """Return a cache for b rows of s keys with nothing in it.

        dtype: one of ``DTYPES``, or another float; raises ValueError for anything else.
        """
        dtype = jnp.dtype(dtype)
        if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"a cache cannot store {dtype.name}; one of {', '.join(DTYPES)}")
        shape = (layers, b, heads, s, h)
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        scales = ()
        if dtype == jnp.int8:
            scales = jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape[:-1], jnp.float32)
        return cls(k, v, jnp.zeros((b,), jnp.int32), *scales)

    @property
    def buffers(self) -> tuple:
        """(k, v), or (k, v, k_scale, v_scale): what layers are given and give back."""
        pair = self.k, self.v
        return pair if self.k_scale is None else (*pair, self.k_scale, self.v_scale)

    @classmethod
    def of(cls, buffers: tuple, length: Array) -> "Cache":
        """Return the cache of these ``buffers``."""
        k, v, *scales = buffers
        return cls(k, v, length, *scales)

    def unstack(self) -> "Cache":
        """Return the cache with a buffer for each layer."""
        apart = (tuple(x[i : i + 1] for i in range(x.shape[0])) for x in self.buffers)
        return Cache.of(tuple(apart), self.length)

    def take(self, rows: Array) -> "Cache":
        """Return the cache of ``rows``, int32[b'], stacked or not; a row may come several times."""
        taken = jax.tree.map(lambda x: x.at[:, rows].get(mode="promise_in_bounds"), self.buffers)
        return Cache.of(taken, self.length[rows])


def store(buffers: tuple, layer: Array, at: Array | None, k: Array, v: Array) -> tuple:
    """Write new keys and values of one layer, each [b, t, k, h]; returns the updated buffers.

    buffers: of a stacked ``Cache``. An int8 cache rounds each head's h numbers to steps of
    max|x| / 127. at: see ``write``.
    """
    new = k, v
    if len(buffers) > 2:
        (k, k_scale), (v, v_scale) = (int8.quantize(x, (3,)) for x in new)
        new = k, v, k_scale, v_scale
    return tuple(write(buffer, layer, at, x) for buffer, x in zip(buffers, new, strict=True))


def write(buffer: Array, layer: Array, at: Array | None, new: Array) -> Array:
    """Write new keys, values or scales of one layer, [b, t, k, ...], into their stacked buffer.

    at: int32[b], the place in each row of its one new key; None writes t keys from 0 (a prefill).
    """
    new = new.swapaxes(1, 2).astype(buffer.dtype)
    if at is None:
        return jax.lax.dynamic_update_slice(buffer, new[None], (layer, *[0] * new.ndim))
    if new.shape[2] != 1:
        raise ValueError(f"decoding writes one key a row, got {new.shape[2]}")
    if several_devices():
        # Mapped over rows and heads: the partitioner then sees that each device writes its own,
        # and nothing travels.
        def one(buffer, at, new):
            return buffer.at[layer, at].set(new, mode="promise_in_bounds")

        over_heads = jax.vmap(one, (1, None, 0), 1)
        return jax.vmap(over_heads, (1, 0, 0), 1)(buffer, at, new[:, :, 0])
    # One scatter of single heads: XLA's CPU backend would turn fewer, larger updates into dynamic
    # slices, and copy the buffer for each of them.
    rows, heads = jnp.arange(new.shape[0])[:, None], jnp.arange(new.shape[1])
    to = buffer.at[layer, rows, heads, at[:, None]]
    return to.set(new[:, :, 0], mode="promise_in_bounds")
