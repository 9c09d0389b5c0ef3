"""Range attention for CUDA GPUs: Pallas kernels lowered through Triton.

Three kernels: forward here, dq, and dk with dv, in ``flash_triton_backward``. Each walks over the
blocks that ``mmjax.ops.blocks`` names, those without a mask in a loop of their own. Elsewhere they
run interpreted, for tests.

JAX deprecates this backend from 0.11 on (DeprecationWarning at lowering, hidden by Python's
defaults and not touched here). Once JAX has removed it, importing this module raises ImportError
and ``mmjax.ops.implementations`` goes on without it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmjax.ops import implementations
from mmjax.ops import triton_parts as parts
from mmjax.ops.flash_triton_backward import backward
from mmjax.ops.kernel_rule import bounds_of, differentiable, interpreted

MAX_HEAD_DIM = max(parts.TILES)
DTYPES = ("bfloat16", "float16", "float32")


def problem(call: implementations.Call) -> str | None:
    """Tell what keeps the kernels from a call, compiled or interpreted; None if nothing does."""
    if call.q.shape[3] > MAX_HEAD_DIM:
        return f"head dim {call.q.shape[3]} is above {MAX_HEAD_DIM}"
    return call.dtype_problem(DTYPES)


def flash_attention(
    q, k, v, ranges, alibi_slopes, *, causal: bool, scale: float, interpret: bool | None = None
) -> Array:
    """Compute range attention; the contract is that of ``mmjax.ops.attention.attention``.

    scale is a Python number. interpret: run the kernels as plain JAX; None does so off a GPU.
    """
    start, end = bounds_of(q, k, ranges, causal)
    return _flash(q, k, v, start, end, alibi_slopes, float(scale), interpreted(interpret))


def _forward(q, k, v, start, end, slopes, scale, interpret):
    """Return the output and the log-sum-exp, float32[b, n, t], natural logarithm."""
    tile = parts.tiles(q.shape[3], q.shape[1], k.shape[1], q.dtype)[0]
    return _tiled_forward(q, k, v, start, end, slopes, tile, scale, interpret)


# jit, because jax 0.10 never drops a pallas_call whose results nobody uses, as rematerialisation
# leaves one behind; it does drop a jit. Later versions drop both.
@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _tiled_forward(q, k, v, start, end, slopes, tile, scale, interpret):
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    hp = parts.padded(h)
    grid, inputs, heads, stats = parts.query_side(tile, hp, n // kv, q, k, v, start, end, slopes)
    outputs = [
        (jax.ShapeDtypeStruct(q.shape, q.dtype), *heads),
        (jax.ShapeDtypeStruct((b, n, t), jnp.float32), *stats),
    ]
    kernel = functools.partial(_forward_kernel, tile=tile, t=t, s=s, h=h, scale=scale)
    return parts.call(kernel, "flash_forward", grid, tile, interpret, inputs, outputs)


_flash = differentiable(_forward, backward)


def _forward_kernel(
    bounds_ref, start_ref, end_ref, slope_ref, q_ref, k_ref, v_ref, out_ref, lse_ref,
    *, tile, t, s, h, scale,
):  # fmt: skip
    hp, i0 = q_ref.shape[1], pl.program_id(0) * tile.q
    rows = parts.mask(i0, tile.q, t, h, hp)
    q = parts.load(q_ref, rows)
    start = parts.load_row(start_ref, i0, tile.q, t, 0)
    end = parts.load_row(end_ref, i0, tile.q, t, 0)
    slope = None if slope_ref is None else slope_ref[0]

    def block(j, carry, masked):
        acc, m, total = carry
        j0 = j * tile.k
        there, at = parts.mask(j0, tile.k, s if masked else None, h, hp), pl.ds(j0, tile.k)
        k = parts.load(k_ref.at[at, :], there)
        ranges = (start, end) if masked else None
        score = parts.scores(q, k, i0, j0, slope, ranges, scale)
        m_new = jnp.maximum(m, score.max(1))
        finite = jnp.where(m_new == -jnp.inf, 0.0, m_new)
        p, keep = jnp.exp2(score - finite[:, None]), jnp.exp2(m - finite)
        v = parts.load(v_ref.at[at, :], there)
        acc = acc * keep[:, None] + plgpu.dot(p.astype(v.dtype), v)
        return acc, m_new, total * keep + p.sum(1)

    stats = jnp.full((tile.q,), -jnp.inf, jnp.float32)
    acc = jnp.zeros((tile.q, hp), jnp.float32)
    acc, m, total = parts.loops(bounds_ref, block, (acc, stats, jnp.zeros_like(stats)))
    # A query without keys took part in the blocks that need no mask: its sums mean nothing.
    empty = (start >= end) | (total == 0)
    safe = jnp.where(empty, 1.0, total)
    out = jnp.where(empty[:, None], 0.0, acc / safe[:, None]).astype(out_ref.dtype)
    # +inf for an empty row: exp(score - inf) is 0 in the backward pass, without a case.
    lse = jnp.where(empty, jnp.inf, m / parts.LOG2E + jnp.log(safe))
    plgpu.store(out_ref, out, mask=rows)
    plgpu.store(lse_ref, lse, mask=i0 + jnp.arange(tile.q) < t if t % tile.q else None)
