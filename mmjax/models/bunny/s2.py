"""S2: a vision tower that looks at an image at several scales, in tiles of its own size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from mmjax.parallel.sharding import constrain
from mmjax.types import MMJaxError

_A = -0.75  # of the cubic kernel, as torch and OpenCV have it; others take -0.5


def check_scales(scales: Sequence[int], tile: int) -> tuple[int, ...]:
    """Return the scales in ascending order, as the peer has them: that of the channels.

    tile: the side in pixels that the tower takes. Raises MMJaxError for scales that do not begin
    with it, and for one that is no multiple of it.
    """
    ordered = tuple(sorted(scales))
    odd = [scale for scale in ordered if scale % tile]
    if odd or not ordered or ordered[0] != tile:
        raise MMJaxError(
            f"s2_scales are {', '.join(map(str, scales)) or 'empty'} and the vision tower takes "
            f"{tile} pixels; give {tile} and multiples of it, such as {tile},{2 * tile},{3 * tile}"
        )
    return ordered


def num_tiles(scales: Sequence[int], tile: int) -> int:
    """Return how many times the tower runs for one image; raises as ``check_scales`` does."""
    return sum((scale // tile) ** 2 for scale in check_scales(scales, tile))


def s2_features(
    tower: Callable[[Array], Array], images: Array, scales: Sequence[int], tile: int
) -> Array:
    """Map normalised images [b, S, S, c] to features [b, p, d * scales] (Shi et al. 2024).

    The images are resized to each scale and cut into tiles, the tower maps all of them at once,
    [n, tile, tile, c] to [n, p, d], and the features of each scale are put together again and
    averaged over squares to the p places of the smallest one. Of a token, the d numbers of the
    smallest scale come first. Raises as ``check_scales`` does.
    """
    b, channels = images.shape[0], images.shape[-1]
    counts = [scale // tile for scale in check_scales(scales, tile)]
    tiles = [_cut(resize_bicubic(images, n * tile), n, tile) for n in counts]
    # Samples first, then tiles: a batch that is cut over devices stays cut as it is.
    joined = jnp.concatenate(tiles, axis=1).reshape(-1, tile, tile, channels)
    out = tower(joined)
    p, d = out.shape[1:]
    out = out.reshape(b, -1, p, d)
    ends = np.cumsum([n * n for n in counts])
    parts = jnp.split(out, ends[:-1].tolist(), axis=1)
    merged = [_average(part, n) for part, n in zip(parts, counts, strict=True)]
    return constrain(jnp.concatenate(merged, axis=-1), "batch", None, "embed")


def _cut(images: Array, n: int, tile: int) -> Array:
    """Cut images [b, n tile, n tile, c] into tiles [b, n n, tile, tile, c], row by row."""
    b, channels = images.shape[0], images.shape[-1]
    grid = images.reshape(b, n, tile, n, tile, channels).swapaxes(2, 3)
    return grid.reshape(b, n * n, tile, tile, channels)


def _average(features: Array, n: int) -> Array:
    """Average the features [b, n n, p, d] of n x n tiles over squares of n x n: [b, p, d]."""
    if n == 1:
        return features[:, 0]
    b, _, p, d = features.shape
    side = math.isqrt(p)
    whole = features.reshape(b, n, n, side, side, d).swapaxes(2, 3)
    squares = whole.reshape(b, side, n, side, n, d)
    return squares.mean((2, 4), dtype=jnp.float32).astype(features.dtype).reshape(b, p, d)


def resize_bicubic(images: Array, size: int) -> Array:
    """Resize images [b, S, S, c] to [b, size, size, c] as torch's ``interpolate`` does.

    Bicubic (Keys 1981) with a = -0.75, without antialiasing, the corners of the outermost pixels
    aligned, edges repeated; float32. ``jax.image.resize`` has another kernel, and antialiasing.
    """
    images = images.astype(jnp.float32)
    for axis in (2, 1):
        images = _resize(images, axis, size)
    return images


def _resize(x: Array, axis: int, size: int) -> Array:
    if x.shape[axis] == size:
        return x
    taps, weights = _cubic(x.shape[axis], size)
    out = jnp.zeros((), jnp.float32)
    for at, weight in zip(taps, weights, strict=True):
        if weight.any():  # at a ratio such as 3 a single one of the four is not zero
            shape = [size if i == axis else 1 for i in range(x.ndim)]
            out = out + jnp.take(x, at, axis=axis) * weight.reshape(shape)
    return out


def _cubic(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the four pixels that each new one is made of, int32[4, new], and their weights."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centre)
    t = centre - first

    def near(x):  # of a pixel closer than 1
        return ((_A + 2) * x - (_A + 3)) * x * x + 1

    def far(x):  # closer than 2
        return ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A

    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])
    taps = np.clip(first + np.arange(-1, 3)[:, None], 0, old - 1)
    return taps.astype(np.int32), weights.astype(np.float32)
