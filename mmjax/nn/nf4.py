"""Weight-only nf4: kernels of linear maps as 4-bit codes, with an absolute maximum per 64 inputs.

QLoRA's NormalFloat (Dettmers et al. 2023): the sixteen values a code may stand for are quantiles of
a normal distribution, times the largest weight of its block. The maxima stay float32, which makes
4.5 bits a weight; they are not quantised once more.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = 64

VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""What the codes stand for (Appendix E of the paper)."""


@partial(jax.jit, static_argnums=1)
def quantize(kernel: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Round a kernel to the nearest values of its blocks; returns (codes uint8, maxima float32).

    axes: those of the inputs of the map, next to one another. A block is 64 inputs of one output,
    in their flat order; where they do not divide, the last is shorter. In both results one axis
    takes the place of ``axes``: pairs of inputs, the even one in the high four bits, and blocks.
    """
    at = axes[0]
    lead, inputs, outputs = _parts(kernel.shape, axes)
    size = math.prod(inputs)
    blocks = -(-size // BLOCK)
    flat = kernel.astype(jnp.float32).reshape(*lead, size, *outputs)
    rest = [(0, blocks * BLOCK - size) if axis == at else (0, 0) for axis in range(flat.ndim)]
    parts = jnp.pad(flat, rest).reshape(*lead, blocks, BLOCK, *outputs)
    largest = jnp.max(jnp.abs(parts), axis=at + 1)
    parts = parts / jnp.expand_dims(jnp.where(largest > 0, largest, 1.0), at + 1)
    between = (VALUES[:-1] + VALUES[1:]) / 2
    codes = sum((parts > x).astype(jnp.uint8) for x in between)
    pairs = codes.reshape(*lead, blocks * BLOCK // 2, 2, *outputs)
    even, odd = (jax.lax.index_in_dim(pairs, i, at + 1, keepdims=False) for i in (0, 1))
    packed = jax.lax.slice_in_dim(even << 4 | odd, 0, -(-size // 2), axis=at)
    return packed, largest


def dequantize(packed: Array, largest: Array, inputs: tuple[int, ...], at: int, dtype) -> Array:
    """Return the kernel that codes stand for, its inputs apart again.

    inputs: their sizes. at: the axis of ``packed`` and ``largest`` that stands for them.
    """
    lead, outputs = packed.shape[:at], packed.shape[at + 1 :]
    size, blocks = math.prod(inputs), largest.shape[at]
    codes = jnp.stack([packed >> 4, packed & 15], at + 1).reshape(*lead, -1, *outputs)
    values = jnp.asarray(VALUES).at[codes].get(mode="promise_in_bounds")
    if size == blocks * BLOCK:
        values = values.reshape(*lead, blocks, BLOCK, *outputs) * jnp.expand_dims(largest, at + 1)
    else:
        of_each = jnp.repeat(largest, BLOCK, axis=at)
        values, of_each = (jax.lax.slice_in_dim(x, 0, size, axis=at) for x in (values, of_each))
        values = values * of_each
    return values.astype(dtype).reshape(*lead, *inputs, *outputs)


def _parts(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Split a kernel's shape into what stands before its inputs, the inputs, and the outputs."""
    return shape[: axes[0]], shape[axes[0] : axes[-1] + 1], shape[axes[-1] + 1 :]
