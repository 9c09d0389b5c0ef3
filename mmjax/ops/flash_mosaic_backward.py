"""The backward pass of ``mmjax.ops.flash_mosaic``: one kernel for dq, one for dk and dv.

Both compute the probabilities again from the saved log-sum-exp. Each writes what its programs own,
so that nothing is added up across programs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmjax.ops import blocks
from mmjax.ops import mosaic_parts as parts

# Queries beyond the last: their lse makes every probability of theirs 0.
PADDING = dict(start=0, end=0, lse=jnp.inf, delta=0)


def backward(q, k, v, start, end, slopes, out, lse, grad, scale, interpret):
    """Return (dq, dk, dv). lse: float32[b, n, t], natural logarithm; grad: of out, [b, t, n, h]."""
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), -1).swapaxes(1, 2)
    rows = dict(start=start, end=end, lse=lse * parts.LOG2E, delta=delta)
    arrays = dict(slopes=slopes, q=q, k=k, v=v, grad=grad)
    return _dq(rows, arrays, scale, interpret), *_dkv(rows, arrays, scale, interpret)


def _inputs(rows, arrays, bounds, size):
    """Return what both kernels read; rows are padded to a multiple of ``size`` queries."""
    padded = parts.padded(size, *rows.values(), values=[PADDING[key] for key in rows])
    return dict(bounds=bounds, **dict(zip(rows, padded, strict=True)), **arrays)


def _rows(x, row, head, at):
    """Return a block of queries of a head in each of the arrays that have one."""
    return dict(
        q=x.q.at[row, at, head],
        grad=x.grad.at[row, at, head],
        start=x.start.at[row, at],
        end=x.end.at[row, at],
        lse=x.lse.at[row, head, at],
        delta=x.delta.at[row, head, at],
    )


def _row_types(h, dtype):
    """Return (shape of a row, dtype) of what ``_rows`` returns."""
    numbers, places = ((), jnp.float32), ((), jnp.int32)
    heads = ((h,), dtype)
    return dict(q=heads, grad=heads, start=places, end=places, lse=numbers, delta=numbers)


def _dq(rows, arrays, scale, interpret):
    q, k = arrays["q"], arrays["k"]
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    tile = parts.TILES[h].dq
    bounds = blocks.key_bounds(*blocks.cut(rows["start"], rows["end"], s, tile.program, tile.walk))
    heads = ((h,), q.dtype)
    scratch = dict(
        own=parts.own(tile, **_row_types(h, q.dtype)),
        keys=parts.ring(tile, heads),
        values=parts.ring(tile, heads),
        staging=parts.staging(tile, q.dtype, interpret),
    )
    inputs = _inputs(rows, arrays, bounds, tile.program)
    outputs = dict(dq=jax.ShapeDtypeStruct(q.shape, q.dtype))
    kernel = functools.partial(_dq_kernel, tile=tile, groups=n // kv, scale=scale)
    grid = (b, n, pl.cdiv(t, tile.program))
    return parts.call(kernel, "flash_dq", grid, tile, interpret, inputs, outputs, scratch)[0]


def _dkv(rows, arrays, scale, interpret):
    q, k = arrays["q"], arrays["k"]
    b, _, n, h = q.shape
    s, kv = k.shape[1:3]
    tile = parts.TILES[h].dkv
    # A program owns a block of keys of one kv head, and walks over the queries of its group.
    key_blocks = pl.cdiv(s, tile.program)
    cut = blocks.cut(rows["start"], rows["end"], s, tile.walk, tile.program)
    heads = ((h,), q.dtype)
    scratch = dict(
        own=parts.own(tile, k=heads, v=heads),
        queries=parts.ring(tile, *_row_types(h, q.dtype).values()),
        staging=parts.staging(tile, q.dtype, interpret),
    )
    inputs = _inputs(rows, arrays, blocks.query_bounds(*cut, key_blocks), tile.walk)
    outputs = {key: jax.ShapeDtypeStruct(k.shape, k.dtype) for key in ("dk", "dv")}
    kernel = functools.partial(_dkv_kernel, tile=tile, groups=n // kv, scale=scale)
    grid = (b, kv, key_blocks)
    return parts.call(kernel, "flash_dkv", grid, tile, interpret, inputs, outputs, scratch)


def _dq_kernel(x, own, keys, values, staging, *, tile, groups, scale):
    row, head, block, bounds = parts.program(x.bounds, last_first=True)

    def load():
        kv_head = lax.div(head, jnp.int32(groups))
        parts.load_keys(tile, row, kv_head, bounds, x.k, x.v, keys, values)

    def compute(warpgroup):
        i0 = block * tile.program + warpgroup * tile.own
        at = pl.ds(i0, tile.own)
        mine = parts.load_own(own, warpgroup, **_rows(x, row, head, at))
        start, end, lse, delta = (
            plgpu.load(ref, layout=parts.vector(0))
            for ref in (mine.start, mine.end, mine.lse, mine.delta)
        )
        slope = None if x.slopes is None else x.slopes[head]
        stage = None if staging is None else staging.at[warpgroup]
        (k_slots,), (v_slots,) = keys.slots, values.slots

        def step(j, _, masked, dq):
            slot = parts.slot_of(tile, j - bounds[0])
            plgpu.barrier_wait(keys.loaded.at[slot])
            score = parts.product(mine.q, k_slots.at[slot].T) * (scale * parts.LOG2E)
            ranges = (start, end) if masked else None
            score = parts.masked(score, i0, j * tile.walk, slope, ranges, 0)
            p = jnp.exp2(score - parts.over(lse, score.shape, 0))
            plgpu.barrier_wait(values.loaded.at[slot])
            dp = parts.product(mine.grad, v_slots.at[slot].T)
            plgpu.barrier_arrive(values.freed.at[slot])
            ds = p * (dp - parts.over(delta, score.shape, 0))
            plgpu.wgmma(dq, parts.left(ds.astype(k_slots.dtype), stage), k_slots.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(keys.freed.at[slot])

        def walk(dq):
            parts.loops(bounds, functools.partial(step, dq=dq), None)
            return dq[...]

        dq = pl.run_scoped(walk, plgpu.ACC(mine.q.shape, jnp.float32))
        parts.store((dq * scale, mine.q, x.dq.at[row, at, head]))

    parts.share(tile, load, compute)


def _dkv_kernel(x, own, queries, staging, *, tile, groups, scale):
    row, kv_head, block, bounds = parts.program(x.bounds, last_first=False)
    first, count = bounds[0], bounds[3] - bounds[0]

    def load():
        def sources(step):
            head = kv_head * groups + lax.div(step, count)
            i0 = (first + lax.rem(step, count)) * tile.walk
            return _rows(x, row, head, pl.ds(i0, tile.walk)).values()

        parts.load_rings(tile, groups * count, (queries, sources))

    def compute(warpgroup):
        j0 = block * tile.program + warpgroup * tile.own
        at = pl.ds(j0, tile.own)
        mine = parts.load_own(
            own, warpgroup, k=x.k.at[row, at, kv_head], v=x.v.at[row, at, kv_head]
        )
        stage = None if staging is None else staging.at[warpgroup]

        # Scores are kept as [keys, queries]: they are then left operands as they lie.
        def step(i, _, masked, g, dk, dv):
            slot = parts.slot_of(tile, g * count + i - first)
            plgpu.barrier_wait(queries.loaded.at[slot])
            q, grad, *rows = (slots.at[slot] for slots in queries.slots)
            # Each is read where it is used: a thread holds a quarter of a vector along this axis.
            start, end, lse, delta = (
                functools.partial(plgpu.load, ref, layout=parts.vector(1)) for ref in rows
            )
            score = parts.product(mine.k, q.T) * (scale * parts.LOG2E)
            slope = None if x.slopes is None else x.slopes[kv_head * groups + g]
            ranges = (start(), end()) if masked else None
            score = parts.masked(score, i * tile.walk, j0, slope, ranges, 1)
            p = jnp.exp2(score - parts.over(lse(), score.shape, 1))
            plgpu.wgmma(dv, parts.left(p.astype(q.dtype), stage), grad)
            dp = parts.product(mine.v, grad.T)
            ds = p * (dp - parts.over(delta(), score.shape, 1))
            plgpu.wgmma(dk, parts.left(ds.astype(q.dtype), stage), q)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(queries.freed.at[slot])

        def walk(dk, dv):
            def head(g, _):
                parts.loops(bounds, functools.partial(step, g=g, dk=dk, dv=dv), None)

            lax.fori_loop(0, groups, head, None)
            return dk[...], dv[...]

        sums = (plgpu.ACC(mine.k.shape, jnp.float32),) * 2
        dk, dv = pl.run_scoped(walk, *sums)
        parts.store(
            (dk * scale, mine.k, x.dk.at[row, at, kv_head]),
            (dv, mine.v, x.dv.at[row, at, kv_head]),
        )

    parts.share(tile, load, compute)
