"""Rotary position embedding (Su et al. 2021), on a leading part of the head."""

import jax.numpy as jnp
from jax import Array


def angles(positions: Array, dims: int, theta: float) -> tuple[Array, Array]:
    """Return cos and sin, float32[b, t, dims / 2], of each position's rotation.

    positions: int32[b, t]; dims: rotated dimensions of a head. Compute once, share by all layers.
    """
    inverse = theta ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    angle = positions.astype(jnp.float32)[..., None] * inverse
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first ``2 * cos.shape[-1]`` dimensions of each head and pass the rest.

    x: [b, t, n, h]. Dimension i pairs with i + dims / 2, not with i + 1 (the GPT-NeoX order, which
    is also Persimmon's and LLaMA's in their Hugging Face layout).
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
