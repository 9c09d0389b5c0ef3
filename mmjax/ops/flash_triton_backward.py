"""The backward pass of ``mmjax.ops.flash_triton``: one kernel for dq, one for dk and dv.

Both compute the probabilities again from the saved log-sum-exp. Each writes what its programs own,
so that nothing is added up across programs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmjax.ops import blocks
from mmjax.ops import triton_parts as parts


def backward(q, k, v, start, end, slopes, out, lse, grad, scale, interpret):
    """Return (dq, dk, dv). lse: float32[b, n, t], natural logarithm; grad: of out, [b, t, n, h]."""
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    groups, hp = n // kv, parts.padded(h)
    tile = parts.tiles(h, t, s, q.dtype)[1]
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), -1).swapaxes(1, 2)
    sizes = dict(tile=tile, t=t, s=s, h=h, scale=scale)

    grid, inputs, heads, stats = parts.query_side(tile, hp, groups, q, k, v, start, end, slopes)
    inputs += [(grad, *heads), (lse, *stats), (delta, *stats)]
    outputs = [(jax.ShapeDtypeStruct(q.shape, q.dtype), *heads)]
    kernel = functools.partial(_dq_kernel, **sizes)
    (dq,) = parts.call(kernel, "flash_dq", grid, tile, interpret, inputs, outputs)

    # A program owns a block of keys of one kv head, and walks over the queries of its group.
    key_blocks = pl.cdiv(s, tile.k)
    bounds = blocks.query_bounds(*blocks.cut(start, end, s, tile.q, tile.k), key_blocks)
    row = ((None, t), lambda j, n, b: (b, 0))
    heads = ((None, t, groups, hp), lambda j, n, b: (b, 0, n, 0))
    keys = ((None, tile.k, None, hp), lambda j, n, b: (b, j, n, 0))
    stats = ((None, groups, t), lambda j, n, b: (b, n, 0))
    inputs = [
        (bounds, (None, None, 4), lambda j, n, b: (b, j, 0)),
        (start, *row),
        (end, *row),
        None if slopes is None else (slopes, (groups,), lambda j, n, b: (n,)),
        (q, *heads),
        (k, *keys),
        (v, *keys),
        (grad, *heads),
        (lse, *stats),
        (delta, *stats),
    ]
    outputs = [(jax.ShapeDtypeStruct(x.shape, x.dtype), *keys) for x in (k, v)]
    kernel = functools.partial(_dkv_kernel, groups=groups, **sizes)
    dk, dv = parts.call(kernel, "flash_dkv", (key_blocks, kv, b), tile, interpret, inputs, outputs)
    return dq, dk, dv


def _dq_kernel(
    bounds_ref, start_ref, end_ref, slope_ref, q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref,
    dq_ref, *, tile, t, s, h, scale,
):  # fmt: skip
    hp, i0 = q_ref.shape[1], pl.program_id(0) * tile.q
    rows = parts.mask(i0, tile.q, t, h, hp)
    q, grad = parts.load(q_ref, rows), parts.load(grad_ref, rows)
    start = parts.load_row(start_ref, i0, tile.q, t, 0)
    end = parts.load_row(end_ref, i0, tile.q, t, 0)
    lse = parts.load_row(lse_ref, i0, tile.q, t, jnp.inf) * parts.LOG2E
    delta = parts.load_row(delta_ref, i0, tile.q, t, 0)
    slope = None if slope_ref is None else slope_ref[0]

    def block(j, dq, masked):
        j0 = j * tile.k
        there, at = parts.mask(j0, tile.k, s if masked else None, h, hp), pl.ds(j0, tile.k)
        k, v = parts.load(k_ref.at[at, :], there), parts.load(v_ref.at[at, :], there)
        ranges = (start, end) if masked else None
        score = parts.scores(q, k, i0, j0, slope, ranges, scale)
        p = jnp.exp2(score - lse[:, None])
        ds = p * (plgpu.dot(grad, v, trans_b=True) - delta[:, None])
        return dq + plgpu.dot(ds.astype(k.dtype), k)

    dq = parts.loops(bounds_ref, block, jnp.zeros((tile.q, hp), jnp.float32))
    plgpu.store(dq_ref, (dq * scale).astype(dq_ref.dtype), mask=rows)


def _dkv_kernel(
    bounds_ref, start_ref, end_ref, slope_ref, q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref,
    dk_ref, dv_ref, *, tile, t, s, h, scale, groups,
):  # fmt: skip
    hp, j0 = k_ref.shape[1], pl.program_id(0) * tile.k
    there = parts.mask(j0, tile.k, s, h, hp)
    k, v = parts.load(k_ref, there), parts.load(v_ref, there)
    keys = j0 + jnp.arange(tile.k)[:, None]

    # Scores are kept as [keys, queries]: they are then left operands as they lie.
    def block(i, carry, masked, g):
        dk, dv = carry
        i0 = i * tile.q
        rows, at = parts.mask(i0, tile.q, t, h, hp), pl.ds(i0, tile.q)
        q, grad = parts.load(q_ref.at[at, g, :], rows), parts.load(grad_ref.at[at, g, :], rows)
        lse = parts.load_row(lse_ref.at[g, at], i0, tile.q, t, jnp.inf) * parts.LOG2E
        delta = parts.load_row(delta_ref.at[g, at], i0, tile.q, t, 0)
        score = plgpu.dot(k, q, trans_b=True) * (scale * parts.LOG2E)
        if slope_ref is not None:
            queries = i0 + jnp.arange(tile.q)[None]
            score -= slope_ref[g] * parts.LOG2E * (queries - keys).astype(jnp.float32)
        if masked:
            start = parts.load_row(start_ref.at[at], i0, tile.q, t, 0)
            end = parts.load_row(end_ref.at[at], i0, tile.q, t, 0)
            seen = (keys >= start[None]) & (keys < end[None])
            score = jnp.where(seen, score, -jnp.inf)
        p = jnp.exp2(score - lse[None])
        ds = p * (plgpu.dot(v, grad, trans_b=True) - delta[None])
        dv += plgpu.dot(p.astype(grad.dtype), grad)
        return dk + plgpu.dot(ds.astype(q.dtype), q), dv

    def head(g, carry):
        return parts.loops(bounds_ref, functools.partial(block, g=g), carry)

    sums = (jnp.zeros((tile.k, hp), jnp.float32),) * 2
    dk, dv = head(jnp.int32(0), sums) if groups == 1 else lax.fori_loop(0, groups, head, sums)
    plgpu.store(dk_ref, (dk * scale).astype(dk_ref.dtype), mask=there)
    plgpu.store(dv_ref, dv.astype(dv_ref.dtype), mask=there)
