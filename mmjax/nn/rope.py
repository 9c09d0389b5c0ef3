"""Rotary position embedding (Su et al. 2021), on a leading part of the head."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rotation for longer texts: slow frequencies are divided by ``factor``.

    Those that turn fewer than ``low_freq_factor`` times in ``original_max_positions`` tokens are
    divided, those that turn more than ``high_freq_factor`` times stay; between them both blend.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __call__(self, inverse: Array) -> Array:
        """Return the frequencies, radians a token, that take the place of float32[dims / 2]."""
        turns = self.original_max_positions * inverse / (2.0 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        stays = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return inverse * (stays + (1.0 - stays) / self.factor)


def angles(
    positions: Array, dims: int, theta: float, scaling: Llama3Scaling | None = None
) -> tuple[Array, Array]:
    """Return cos and sin, float32[b, t, dims / 2], of each position's rotation.

    positions: int32[b, t]; dims: rotated dimensions of a head. Compute once, share by all layers.
    """
    inverse = theta ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    inverse = inverse if scaling is None else scaling(inverse)
    angle = positions.astype(jnp.float32)[..., None] * inverse
    return jnp.cos(angle), jnp.sin(angle)


def grid_angles(side: int, grid: int, dims: int, theta: float) -> tuple[Array, Array]:
    """Return cos and sin, float32[1, side * side, dims / 2], for patches row by row (EVA-02).

    The first half of the angles is the row's, the second the column's. grid: patches a side that
    positions are counted in, whatever ``side`` is: that of the images a tower was trained on first.
    """
    along = jnp.arange(side, dtype=jnp.float32) / side * grid
    rows, columns = jnp.repeat(along, side)[None], jnp.tile(along, side)[None]
    pairs = zip(angles(rows, dims // 2, theta), angles(columns, dims // 2, theta), strict=True)
    cos, sin = (jnp.concatenate(pair, axis=-1) for pair in pairs)
    return cos, sin


def rotate(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Rotate the first ``2 * cos.shape[-1]`` dimensions of each head and pass the rest.

    x: [b, t, n, h]. Dimension i pairs with i + dims / 2 (the GPT-NeoX order, which is also
    Persimmon's and LLaMA's in their Hugging Face layout), or ``interleaved`` 2i with 2i + 1 (GPT-J,
    EVA-02).
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    if interleaved:
        a, b, rest = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
