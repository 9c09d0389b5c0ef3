"""Weight-only int8: kernels of linear maps as bytes, with a float32 scale per output channel."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

LARGEST = 127


@partial(jax.jit, static_argnums=1)
def quantize(kernel: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Round a kernel to int8 steps of its channels; returns (int8 like kernel, float32 scales).

    axes: those a channel runs over, the inputs of the map; the scales lack them. The largest weight
    of a channel is 127 steps, so no weight moves by more than half a step. Of cached keys a channel
    is one head of one position.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    return jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def dequantize(steps: Array, scale: Array, inputs: tuple[int, ...], at: int, dtype) -> Array:
    """Return the kernel that steps stand for. inputs: sizes of the axes from ``at`` on."""
    axes = tuple(range(at, at + len(inputs)))
    return (steps * jnp.expand_dims(scale, axes)).astype(dtype)
