"""What the Mosaic kernels of range attention share: tiles, rings of loads, matmuls, loops.

A program has a few warpgroups that compute, each on rows of its own, and one that loads what they
walk over. It loads by TMA into a ring of slots in shared memory: it waits until all have freed a
slot, they wait until it is loaded. TMA reads zeros beyond the end of an array and writes nothing
there, so lengths need not be multiples of a block; of 8 they must be (``TILE_ROWS``).
"""

import dataclasses
import functools
import math
import types
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)  # exp2 is one instruction on a GPU, exp is two
TILE_ROWS = 8
"""A swizzled tile of shared memory: TMA takes arrays of whole ones."""
# The blocks of a head run side by side: what they all walk over is then read from memory once.
GRID, WARPGROUP = ("row", "head", "block"), "warpgroup"
LOADER_REGISTERS = 24
REGISTERS = 65536 // 128  # of a multiprocessor, for each thread of a warpgroup


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows that a warpgroup owns, warpgroups of a program, rows in a slot of a ring, its slots."""

    own: int
    warpgroups: int
    walk: int
    slots: int

    @property
    def program(self) -> int:
        """Rows that a program owns."""
        return self.own * self.warpgroups


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile


# By head dim. Not measured on a GPU: the most that registers and shared memory hold.
TILES = {
    64: Tiles(Tile(64, 2, 128, 2), Tile(64, 2, 128, 2), Tile(64, 2, 64, 2)),
    128: Tiles(Tile(64, 2, 128, 2), Tile(64, 2, 64, 2), Tile(64, 2, 64, 2)),
}


class Ring(NamedTuple):
    """Slots of shared memory for one or more arrays, and the barriers of each slot."""

    slots: tuple
    loaded: object
    freed: object


def ring(tile: Tile, *arrays) -> Ring:
    """Return what a ring needs in scratch; arrays: (shape of a row, dtype) each."""
    return Ring(
        tuple(plgpu.SMEM((tile.slots, tile.walk, *shape), dtype) for shape, dtype in arrays),
        plgpu.Barrier(num_arrivals=len(arrays), num_barriers=tile.slots),
        plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.slots),
    )


class Own(NamedTuple):
    """Shared memory for the rows that each warpgroup owns, and a barrier for their loads."""

    arrays: dict
    loaded: object


def own(tile: Tile, **arrays) -> Own:
    """Return what a program's own rows need in scratch; arrays: (shape of a row, dtype) each."""
    return Own(
        {
            key: plgpu.SMEM((tile.warpgroups, tile.own, *shape), dtype)
            for key, (shape, dtype) in arrays.items()
        },
        plgpu.Barrier(num_arrivals=len(arrays), num_barriers=tile.warpgroups),
    )


def staging(tile: Tile, dtype, interpret: bool):
    """Return scratch for left operands; JAX's interpreter takes none from registers."""
    return plgpu.SMEM((tile.warpgroups, tile.own, tile.walk), dtype) if interpret else None


def call(kernel, name, grid, tile, interpret, inputs, outputs, scratch):
    """Run a kernel on inputs by name, None for one that is not there; return its outputs.

    The kernel takes one namespace of the refs of inputs and outputs, and scratch by name.
    """
    given = {key: x for key, x in inputs.items() if x is not None}
    absent = dict.fromkeys(inputs.keys() - given.keys())

    def body(*refs, **scratch):
        found = dict(zip((*given, *outputs), refs, strict=True))
        kernel(types.SimpleNamespace(**found, **absent), **scratch)

    return plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=grid,
        grid_names=GRID,
        num_threads=tile.warpgroups + 1,
        thread_name=WARPGROUP,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(*given.values())


def program(bounds, last_first: bool) -> tuple:
    """Return a program's (row, head, block) and its bounds, as ``mmjax.ops.blocks`` orders them.

    last_first: start with the last block, the longest walk of causal queries; the short ones then
    fill up what is left of the GPU at the end.
    """
    row, head, block = (lax.axis_index(name) for name in GRID)
    block = bounds.shape[1] - 1 - block if last_first else block
    return row, head, block, tuple(bounds[row, block, at] for at in range(4))


def share(tile: Tile, load, compute):
    """Run ``compute(warpgroup)`` on all warpgroups but the last, and ``load()`` on that."""
    warpgroup = lax.axis_index(WARPGROUP)

    @pl.when(warpgroup < tile.warpgroups)
    def _():
        most = min(240, (REGISTERS - LOADER_REGISTERS) // tile.warpgroups // 8 * 8)
        plgpu.set_max_registers(most, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == tile.warpgroups)
    def _():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        load()


def load_own(own: Own, warpgroup, **sources):
    """Load the rows of a warpgroup and wait for them; return the refs to them by name."""
    mine = {key: own.arrays[key].at[warpgroup] for key in sources}
    loaded = own.loaded.at[warpgroup]
    for key, source in sources.items():
        plgpu.copy_gmem_to_smem(source, mine[key], loaded)
    plgpu.barrier_wait(loaded)
    return types.SimpleNamespace(**mine)


def load_rings(tile: Tile, count, *rings):
    """Load ``count`` blocks into each ring, waiting for slots that are in use.

    rings: (ring, function from the number of a block to the sources for its slots).
    """

    def fill(x, _, wait):
        slot = slot_of(tile, x)
        for ring, sources in rings:
            if wait:
                plgpu.barrier_wait(ring.freed.at[slot])
            for source, slots in zip(sources(x), ring.slots, strict=True):
                plgpu.copy_gmem_to_smem(source, slots.at[slot], ring.loaded.at[slot])

    def drain(x, _):
        for ring, _ in rings:
            plgpu.barrier_wait(ring.freed.at[slot_of(tile, x)])

    ahead = jnp.minimum(count, tile.slots)
    lax.fori_loop(0, ahead, functools.partial(fill, wait=False), None)
    lax.fori_loop(ahead, count, functools.partial(fill, wait=True), None)
    # No barrier is left with an arrival that nobody saw.
    lax.fori_loop(count - ahead, count, drain, None)


def load_keys(tile: Tile, row, head, bounds, k, v, keys: Ring, values: Ring):
    """Load the blocks of keys and of values that a program's queries meet."""

    def part(ref):
        return lambda x: (ref.at[row, pl.ds((bounds[0] + x) * tile.walk, tile.walk), head],)

    load_rings(tile, bounds[3] - bounds[0], (keys, part(k)), (values, part(v)))


def slot_of(tile: Tile, x):
    """Return the slot of the x-th block that is loaded."""
    return lax.rem(x, jnp.int32(tile.slots))


def product(a, b):
    """Return a @ b as float32; a and b in 16 bits, b in shared memory."""

    def run(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def left(x, staging):
    """Return registers as a left operand; staging: memory to put them in, or None."""
    if staging is None:
        return x
    staging[...] = x
    plgpu.commit_smem()
    return staging


def vector(axis: int):
    """Return the layout of a vector along an axis of a score."""
    return plgpu.Layout.WGMMA.reduce(1 - axis)


def over(x, shape, axis: int):
    """Return a vector along ``axis`` of a matrix, repeated along the other axis."""
    return lax.broadcast_in_dim(x, shape, [axis])


def masked(score, i0, j0, slope, ranges, axis: int):
    """Add ALiBi to scores of base 2, and hide what lies outside of ``ranges``.

    score: of queries from i0 on, along ``axis``, and of keys from j0 on, along the other.
    ranges: (start, end) of the queries, or None where every pair is seen.
    """
    shape = score.shape

    def places(axis, first):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) + first

    if slope is not None:
        distance = places(axis, i0) - places(1 - axis, j0)
        score = score - slope * LOG2E * distance.astype(jnp.float32)
    if ranges is not None:
        keys, (start, end) = places(1 - axis, j0), (over(x, shape, axis) for x in ranges)
        score = jnp.where((keys >= start) & (keys < end), score, -jnp.inf)
    return score


def loops(bounds, block, carry):
    """Walk over the blocks of a program: masked, full, masked."""
    first, full_first, full_last, last = bounds
    edge, full = functools.partial(block, masked=True), functools.partial(block, masked=False)
    carry = lax.fori_loop(first, full_first, edge, carry)
    carry = lax.fori_loop(full_first, full_last, full, carry)
    return lax.fori_loop(full_last, last, edge, carry)


def store(*pairs):
    """Write (numbers, their place in shared memory, part of an array) and wait for that."""
    for numbers, mine, _ in pairs:
        mine[...] = numbers.astype(mine.dtype)
    plgpu.commit_smem()
    for _, mine, part in pairs:
        plgpu.copy_smem_to_gmem(mine, part)
    plgpu.wait_smem_to_gmem(0)


def padded(size: int, *arrays, values):
    """Pad the last axis, the queries', to a multiple of ``size``, each with its value."""
    return (
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)], constant_values=value)
        for x, value in zip(arrays, values, strict=True)
    )
