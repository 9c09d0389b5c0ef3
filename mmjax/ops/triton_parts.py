"""What the Triton kernels of range attention share: tiles, grids, masked loads, loops.

Arrays are read as they lie, [b, t, n, h]. Triton's blocks are powers of two, so a head of 72, 80
or 96 is 128 wide in a block; the columns beyond h are masked in each load and store. Padding the
arrays instead would write and read 128 columns where the masks read h.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmjax.ops import blocks

LOG2E = math.log2(math.e)  # exp2 is one instruction on a GPU, exp is two


@dataclasses.dataclass(frozen=True)
class Tile:
    """The block of queries and of keys a program holds; warps of it; loads in flight."""

    q: int
    k: int
    warps: int
    stages: int


# By padded head dim: (forward, backward). Not measured on a GPU: block sizes common to Triton
# kernels on Hopper, of which no program takes more than 128 KiB of shared memory.
TILES = {
    16: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2)),
    32: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2)),
    64: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2)),
    128: (Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
}


def padded(h: int) -> int:
    """Return the width of a head in a block: a power of two that tensor cores take."""
    return max(16, pl.next_power_of_2(h))


def tiles(h: int, t: int, s: int, dtype) -> tuple[Tile, Tile]:
    """Return the tiles (forward, backward) for a head dim, shrunk to short sequences.

    float32 takes half a tile each way, for the shared memory of one bfloat16 tile at most.
    """
    part = 1 if jnp.dtype(dtype).itemsize <= 2 else 2

    def fit(tile: Tile) -> Tile:
        size = lambda most, length: max(16, min(most // part, pl.next_power_of_2(length)))  # noqa: E731
        return dataclasses.replace(tile, q=size(tile.q, t), k=size(tile.k, s))

    forward, backward = TILES[padded(h)]
    return fit(forward), fit(backward)


def call(kernel, name, grid, tile, interpret, inputs, outputs):
    """Run a kernel on (array, block, index map) inputs, None for one that is not there."""
    spec = lambda x: None if x is None else pl.BlockSpec(x[1], x[2])  # noqa: E731
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec(x) for x in inputs],
        out_specs=[spec(x) for x in outputs],
        out_shape=[x[0] for x in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=name,
    )(*(None if x is None else x[0] for x in inputs))


def query_side(tile, hp, groups, q, k, v, start, end, slopes):
    """Return grid and inputs of a kernel whose programs own a block of queries of one head."""
    b, t, n, _ = q.shape
    s = k.shape[1]
    bounds = blocks.key_bounds(*blocks.cut(start, end, s, tile.q, tile.k))
    row = ((None, tile.q), lambda i, n, b: (b, i))
    heads = ((None, tile.q, None, hp), lambda i, n, b: (b, i, n, 0))
    keys = ((None, s, None, hp), lambda i, n, b: (b, 0, lax.div(n, groups), 0))
    stats = ((None, None, tile.q), lambda i, n, b: (b, n, i))
    inputs = [
        (bounds, (None, None, 4), lambda i, n, b: (b, i, 0)),
        (start, *row),
        (end, *row),
        None if slopes is None else (slopes, (1,), lambda i, n, b: (n,)),
        (q, *heads),
        (k, *keys),
        (v, *keys),
    ]
    return (pl.cdiv(t, tile.q), n, b), inputs, heads, stats


def mask(at, size, limit, h, hp):
    """Return which of the rows [at, at + size) and of the padded head exist, None if all do."""
    there = None if h == hp else jnp.arange(hp)[None] < h
    if limit is not None and limit % size:
        rows = at + jnp.arange(size)[:, None] < limit
        there = rows if there is None else rows & there
    return None if there is None else jnp.broadcast_to(there, (size, hp))


def load(ref, mask, other=0):
    """Load a block, ``other`` where the mask is False; a mask of None costs nothing."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=other)


def load_row(ref, at, size, limit, other):
    """Load one number per query, ``other`` where there is no query."""
    return load(ref, at + jnp.arange(size) < limit if limit % size else None, other)


def scores(q, k, i0, j0, slope, ranges, scale):
    """Return scores [queries, keys] to base 2 of the block at (i0, j0), -inf outside ``ranges``.

    ranges: (start, end) of the queries, or None where every pair is seen.
    """
    score = plgpu.dot(q, k, trans_b=True) * (scale * LOG2E)
    keys = j0 + jnp.arange(k.shape[0])[None]
    if slope is not None:
        queries = i0 + jnp.arange(q.shape[0])[:, None]
        score -= slope * LOG2E * (queries - keys).astype(jnp.float32)
    if ranges is not None:
        seen = (keys >= ranges[0][:, None]) & (keys < ranges[1][:, None])
        score = jnp.where(seen, score, -jnp.inf)
    return score


def loops(bounds_ref, body, carry):
    """Walk over the blocks of a program: masked, full, masked."""
    edge, full = functools.partial(body, masked=True), functools.partial(body, masked=False)
    carry = lax.fori_loop(bounds_ref[0], bounds_ref[1], edge, carry)
    carry = lax.fori_loop(bounds_ref[1], bounds_ref[2], full, carry)
    return lax.fori_loop(bounds_ref[2], bounds_ref[3], edge, carry)
