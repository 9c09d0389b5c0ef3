"""Random weights that are drawn by their names, so that a golden need not hold them.

NumPy alone, and of it the generator whose stream is frozen: the peer's environment and ours draw
the same numbers.
"""

import zlib

import numpy as np

GAIN = 1.5  # of a matrix over its fan-in: attention far from uniform
EMBED = 0.5  # standard deviation of an embedding; smaller, and all tokens look alike
ATTN_GATE, FF_GATE = 0.7, -0.4


def draw(name, shape, seed=0):
    """Return the float32 values of the tensor of this name in a model of a seed.

    Matrices by fan-in, norm scales of both signs, small biases, gates well open.
    """
    if name.endswith("gate"):
        return np.full(shape, ATTN_GATE if "attn" in name else FF_GATE, np.float32)
    stream = np.random.RandomState([seed, zlib.crc32(name.encode())])
    noise = stream.uniform(-(3**0.5), 3**0.5, shape)
    if "embed" in name or "wte" in name:
        noise *= EMBED
    elif len(shape) > 1:
        noise *= GAIN * (noise.size / shape[0]) ** -0.5
    elif not name.endswith("weight"):
        noise *= 0.2
    return noise.astype(np.float32)


def draw_all(shapes, seed=0):
    """Return {name: values} of all tensors of a model. shapes: {name: shape}."""
    return {name: draw(name, tuple(shape), seed) for name, shape in shapes.items()}
