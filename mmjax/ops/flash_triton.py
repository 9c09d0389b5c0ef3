"""Range attention for CUDA GPUs: Pallas kernels lowered through Triton.

Three kernels: forward, dq, and dk with dv. Each walks over the blocks that ``mmjax.ops.blocks``
names, those without a mask in a loop of their own. Elsewhere they run interpreted, for tests.

Arrays are read as they lie, [b, t, n, h]. Triton's blocks are powers of two, so a head of 72, 80
or 96 is 128 wide in a block; the columns beyond h are masked in each load and store. Padding the
arrays instead would write and read 128 columns where the masks read h.

JAX deprecates this backend from 0.11 on (DeprecationWarning at lowering, hidden by Python's
defaults and not touched here). Once JAX has removed it, importing this module raises ImportError
and ``mmjax.ops.attention`` goes on without it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmjax.ops import blocks

LOG2E = math.log2(math.e)  # exp2 is one instruction on a GPU, exp is two
MAX_HEAD_DIM = 128
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Tile:
    """The block of queries and of keys a program holds; warps of it; loads in flight."""

    q: int
    k: int
    warps: int
    stages: int


# By padded head dim: (forward, backward). 64 as tokamax has it for H100; not measured on a GPU.
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
    """Return the tiles (forward, backward) for a head dim, shrunk to short sequences."""

    def fit(tile: Tile) -> Tile:
        most = 128 if jnp.dtype(dtype).itemsize <= 2 else 32  # float32: shared memory
        return dataclasses.replace(
            tile,
            q=min(tile.q, most, max(16, pl.next_power_of_2(t))),
            k=min(tile.k, most, max(16, pl.next_power_of_2(s))),
        )

    forward, backward = TILES[padded(h)]
    return fit(forward), fit(backward)


def flash_attention(
    q, k, v, ranges, alibi_slopes, *, causal: bool, scale: float, interpret: bool | None = None
) -> Array:
    """Compute range attention; the contract is that of ``mmjax.ops.attention.attention``.

    scale is a Python number. interpret: run the kernels as plain JAX; None does so off a GPU.
    """
    b, t = q.shape[:2]
    s = k.shape[1]
    if ranges is None:
        ranges = jnp.zeros((b, t), jnp.int32), jnp.full((b, t), s, jnp.int32)
    start, end = ranges
    if causal:  # two comparisons per score instead of three
        end = jnp.minimum(end, jnp.arange(1, t + 1, dtype=jnp.int32))
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    return _flash(q, k, v, start, end, alibi_slopes, float(scale), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _flash(q, k, v, start, end, slopes, scale, interpret):
    return _flash_fwd(q, k, v, start, end, slopes, scale, interpret)[0]


def _flash_fwd(q, k, v, start, end, slopes, scale, interpret):
    out, lse = _forward(q, k, v, start, end, slopes, scale, interpret)
    # Named inside the rule, as in flash_xla: rematerialisation then never runs the kernel again.
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, start, end, slopes, out, lse)


def _flash_bwd(scale, interpret, residuals, grad):
    slopes = residuals[5]
    dq, dk, dv = _backward(*residuals, grad, scale, interpret)
    return dq, dk, dv, None, None, jax.tree.map(jnp.zeros_like, slopes)


_flash.defvjp(_flash_fwd, _flash_bwd)


# --- Calls ---------------------------------------------------------------------------------------


def _call(kernel, name, grid, tile, interpret, inputs, outputs):
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


def _query_side(tile, hp, groups, q, k, v, start, end, slopes):
    """Return grid and inputs of a kernel whose programs own a block of queries of one head."""
    b, t, n, _ = q.shape
    s = k.shape[1]
    bounds = blocks.key_bounds(*blocks.cut(start, end, s, tile.q, tile.k))
    row = ((None, tile.q), lambda i, n, b: (b, i))
    heads = ((None, tile.q, None, hp), lambda i, n, b: (b, i, n, 0))
    keys = ((None, s, None, hp), lambda i, n, b: (b, 0, n // groups, 0))
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


def _forward(q, k, v, start, end, slopes, scale, interpret):
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    tile = tiles(h, t, s, q.dtype)[0]
    grid, inputs, heads, stats = _query_side(
        tile, padded(h), n // kv, q, k, v, start, end, slopes
    )
    outputs = [
        (jax.ShapeDtypeStruct(q.shape, q.dtype), *heads),
        (jax.ShapeDtypeStruct((b, n, t), jnp.float32), *stats),
    ]
    kernel = functools.partial(_forward_kernel, tile=tile, t=t, s=s, h=h, scale=scale)
    return _call(kernel, "flash_forward", grid, tile, interpret, inputs, outputs)


def _backward(q, k, v, start, end, slopes, out, lse, grad, scale, interpret):
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    groups, hp = n // kv, padded(h)
    tile = tiles(h, t, s, q.dtype)[1]
    delta = jnp.einsum("btnh,btnh->bnt", grad, out, preferred_element_type=jnp.float32)
    sizes = dict(tile=tile, t=t, s=s, h=h, scale=scale)

    grid, inputs, heads, stats = _query_side(tile, hp, groups, q, k, v, start, end, slopes)
    inputs += [(grad, *heads), (lse, *stats), (delta, *stats)]
    outputs = [(jax.ShapeDtypeStruct(q.shape, q.dtype), *heads)]
    kernel = functools.partial(_dq_kernel, **sizes)
    (dq,) = _call(kernel, "flash_dq", grid, tile, interpret, inputs, outputs)

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
    dk, dv = _call(kernel, "flash_dkv", (key_blocks, kv, b), tile, interpret, inputs, outputs)
    return dq, dk, dv


# --- Kernels -------------------------------------------------------------------------------------


def _mask(at, size, limit, h, hp):
    """Return which of the rows [at, at + size) and of the padded head exist, None if all do."""
    mask = None if h == hp else jnp.arange(hp)[None] < h
    if limit is not None and limit % size:
        rows = at + jnp.arange(size)[:, None] < limit
        mask = rows if mask is None else rows & mask
    return None if mask is None else jnp.broadcast_to(mask, (size, hp))


def _load(ref, mask, other=0):
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=other)


def _load_row(ref, at, size, limit, other):
    """Load one number per query, ``other`` where there is no query."""
    return _load(ref, at + jnp.arange(size) < limit if limit % size else None, other)


def _loops(bounds_ref, body, carry):
    """Walk over the blocks of a program: masked, full, masked."""
    edge, full = functools.partial(body, masked=True), functools.partial(body, masked=False)
    carry = lax.fori_loop(bounds_ref[0], bounds_ref[1], edge, carry)
    carry = lax.fori_loop(bounds_ref[1], bounds_ref[2], full, carry)
    return lax.fori_loop(bounds_ref[2], bounds_ref[3], edge, carry)


def _forward_kernel(
    bounds_ref, start_ref, end_ref, slope_ref, q_ref, k_ref, v_ref, out_ref, lse_ref,
    *, tile, t, s, h, scale,
):  # fmt: skip
    hp, i0 = q_ref.shape[1], pl.program_id(0) * tile.q
    rows = _mask(i0, tile.q, t, h, hp)
    q = _load(q_ref, rows)
    start = _load_row(start_ref, i0, tile.q, t, 0)
    end = _load_row(end_ref, i0, tile.q, t, 0)
    slope = None if slope_ref is None else slope_ref[0] * LOG2E

    def block(j, carry, masked):
        acc, m, total = carry
        j0 = j * tile.k
        there, at = _mask(j0, tile.k, s if masked else None, h, hp), pl.ds(j0, tile.k)
        k = _load(k_ref.at[at, :], there)
        score = plgpu.dot(q, k, trans_b=True) * (scale * LOG2E)
        keys = j0 + jnp.arange(tile.k)[None]
        if slope is not None:
            queries = i0 + jnp.arange(tile.q)[:, None]
            score -= slope * (queries - keys).astype(jnp.float32)
        if masked:
            seen = (keys >= start[:, None]) & (keys < end[:, None])
            score = jnp.where(seen, score, -jnp.inf)
        m_new = jnp.maximum(m, score.max(1))
        finite = jnp.where(m_new == -jnp.inf, 0.0, m_new)
        p, keep = jnp.exp2(score - finite[:, None]), jnp.exp2(m - finite)
        v = _load(v_ref.at[at, :], there)
        acc = acc * keep[:, None] + plgpu.dot(p.astype(v.dtype), v)
        return acc, m_new, total * keep + p.sum(1)

    stats = jnp.full((tile.q,), -jnp.inf, jnp.float32)
    acc = jnp.zeros((tile.q, hp), jnp.float32)
    acc, m, total = _loops(bounds_ref, block, (acc, stats, jnp.zeros_like(stats)))
    # A query without keys took part in the blocks that need no mask: its sums mean nothing.
    empty = (start >= end) | (total == 0)
    safe = jnp.where(empty, 1.0, total)
    out = jnp.where(empty[:, None], 0.0, acc / safe[:, None]).astype(out_ref.dtype)
    # +inf for an empty row: exp(score - inf) is 0 in the backward pass, without a case.
    lse = jnp.where(empty, jnp.inf, m / LOG2E + jnp.log(safe))
    plgpu.store(out_ref, out, mask=rows)
    plgpu.store(lse_ref, lse, mask=i0 + jnp.arange(tile.q) < t if t % tile.q else None)


def _dq_kernel(
    bounds_ref, start_ref, end_ref, slope_ref, q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref,
    dq_ref, *, tile, t, s, h, scale,
):  # fmt: skip
    hp, i0 = q_ref.shape[1], pl.program_id(0) * tile.q
    rows = _mask(i0, tile.q, t, h, hp)
    q, grad = _load(q_ref, rows), _load(grad_ref, rows)
    start = _load_row(start_ref, i0, tile.q, t, 0)
    end = _load_row(end_ref, i0, tile.q, t, 0)
    lse = _load_row(lse_ref, i0, tile.q, t, jnp.inf) * LOG2E
    delta = _load_row(delta_ref, i0, tile.q, t, 0)
    slope = None if slope_ref is None else slope_ref[0] * LOG2E

    def block(j, dq, masked):
        j0 = j * tile.k
        there, at = _mask(j0, tile.k, s if masked else None, h, hp), pl.ds(j0, tile.k)
        k, v = _load(k_ref.at[at, :], there), _load(v_ref.at[at, :], there)
        score = plgpu.dot(q, k, trans_b=True) * (scale * LOG2E)
        keys = j0 + jnp.arange(tile.k)[None]
        if slope is not None:
            queries = i0 + jnp.arange(tile.q)[:, None]
            score -= slope * (queries - keys).astype(jnp.float32)
        if masked:
            seen = (keys >= start[:, None]) & (keys < end[:, None])
            score = jnp.where(seen, score, -jnp.inf)
        p = jnp.exp2(score - lse[:, None])
        ds = p * (plgpu.dot(grad, v, trans_b=True) - delta[:, None])
        return dq + plgpu.dot(ds.astype(k.dtype), k)

    dq = _loops(bounds_ref, block, jnp.zeros((tile.q, hp), jnp.float32))
    plgpu.store(dq_ref, (dq * scale).astype(dq_ref.dtype), mask=rows)


def _dkv_kernel(
    bounds_ref, start_ref, end_ref, slope_ref, q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref,
    dk_ref, dv_ref, *, tile, t, s, h, scale, groups,
):  # fmt: skip
    hp, j0 = k_ref.shape[1], pl.program_id(0) * tile.k
    there = _mask(j0, tile.k, s, h, hp)
    k, v = _load(k_ref, there), _load(v_ref, there)
    keys = j0 + jnp.arange(tile.k)[:, None]

    # Scores are kept as [keys, queries]: they are then left operands as they lie.
    def block(i, carry, masked, g):
        dk, dv = carry
        i0 = i * tile.q
        rows, at = _mask(i0, tile.q, t, h, hp), pl.ds(i0, tile.q)
        q, grad = _load(q_ref.at[at, g, :], rows), _load(grad_ref.at[at, g, :], rows)
        lse = _load_row(lse_ref.at[g, at], i0, tile.q, t, jnp.inf) * LOG2E
        delta = _load_row(delta_ref.at[g, at], i0, tile.q, t, 0)
        score = plgpu.dot(k, q, trans_b=True) * (scale * LOG2E)
        if slope_ref is not None:
            queries = i0 + jnp.arange(tile.q)[None]
            score -= slope_ref[g] * LOG2E * (queries - keys).astype(jnp.float32)
        if masked:
            start = _load_row(start_ref.at[at], i0, tile.q, t, 0)
            end = _load_row(end_ref.at[at], i0, tile.q, t, 0)
            seen = (keys >= start[None]) & (keys < end[None])
            score = jnp.where(seen, score, -jnp.inf)
        p = jnp.exp2(score - lse[None])
        ds = p * (plgpu.dot(v, grad, trans_b=True) - delta[None])
        dv += plgpu.dot(p.astype(grad.dtype), grad)
        return dk + plgpu.dot(ds.astype(q.dtype), q), dv

    def head(g, carry):
        return _loops(bounds_ref, functools.partial(block, g=g), carry)

    zeros = jnp.zeros((tile.k, hp), jnp.float32)
    dk, dv = head(0, (zeros, zeros)) if groups == 1 else lax.fori_loop(0, groups, head, (zeros,) * 2)
    plgpu.store(dk_ref, (dk * scale).astype(dk_ref.dtype), mask=there)
    plgpu.store(dv_ref, dv.astype(dv_ref.dtype), mask=there)
