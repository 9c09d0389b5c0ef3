"""Blockwise attention in plain XLA: the reference, and the path for CPUs.

Queries are cut into static chunks, each against the keys that causality leaves it. The backward
pass recomputes the probabilities from the saved log-sum-exp, so memory is O(t) in both directions.
Long sequences also cut the keys, with the online softmax (Milakov & Gimelshein 2018; Dao 2022),
inside ``lax`` loops whose bounds come from the ranges: compile time stays flat, and blocks outside
every range are skipped. So do shorter rows of packed samples that leave most keys unseen.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

BLOCK_Q = 128  # an unrolled chunk of queries takes all its keys in one block
LOOP_BLOCK_Q = LOOP_BLOCK_K = 512  # in loops, where smaller blocks cost a fifth to a third
# On a CPU, rows (one kv head of one sample) are taken a few at a time, so that a block of scores
# stays in the cache between its matmuls: 2 to 3 times faster than all rows at once.
CPU_BLOCK_BYTES = 2**20
# Above this many queries the loops stay loops: unrolling would cost compile time quadratically.
UNROLL_LIMIT = 2048
# Rows this long may hold so many short samples that loops over small blocks meet few of the pairs.
SHORT_SAMPLES_FROM = 1024
SHORT_BLOCK = 128


def problem(call) -> None:
    """Nothing keeps this one from any call."""


def flash_attention(q, k, v, ranges, alibi_slopes, *, causal: bool, scale: float) -> Array:
    """Compute range attention; the contract is that of ``mmjax.ops.attention.attention``."""
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    # Rows are (sample, kv head) pairs and come first: every block is one batched matmul.
    # Scaled in float32: bfloat16 would round the factor itself, for all scores alike.
    qr = (q.astype(jnp.float32) * scale).astype(q.dtype)
    qr = qr.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)
    qr = qr.reshape(b * kv, n // kv, t, h)
    kr, vr = (x.transpose(0, 2, 1, 3).reshape(b * kv, s, h) for x in (k, v))
    if ranges is not None:
        start, end = (jnp.repeat(r, kv, axis=0) for r in ranges)
        # Two comparisons per score instead of three: with ranges, causality is part of them.
        ranges = (start, jnp.minimum(end, jnp.arange(1, t + 1)) if causal else end)
    slopes = None if alibi_slopes is None else jnp.tile(alibi_slopes.reshape(kv, -1), (b, 1))
    out = _flash(qr, kr, vr, ranges, slopes, causal)
    return out.reshape(b, n, t, h).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, ranges, slopes, causal):
    return _flash_fwd(q, k, v, ranges, slopes, causal)[0]


def _flash_fwd(q, k, v, ranges, slopes, causal):
    out, lse = _either(_forward, (q, k, v, ranges, slopes), causal)
    # Named here, inside the rule: a name on the caller's output would not save the residuals, and
    # rematerialisation would run the forward pass a second time.
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, ranges, slopes, out, lse)


def _flash_bwd(causal, residuals, grad):
    ranges, slopes = residuals[3:5]
    dq, dk, dv = _either(_backward, (*residuals, grad), causal)
    return dq, dk, dv, jax.tree.map(lambda x: None, ranges), jax.tree.map(jnp.zeros_like, slopes)


_flash.defvjp(_flash_fwd, _flash_bwd)


def _either(fn, args, causal):
    """Call ``fn`` on a few rows at a time, its blocks in loops where samples are short."""
    t, s, ranges = args[0].shape[2], args[1].shape[1], args[3]
    unrolled, loop = (
        functools.partial(_few_rows, functools.partial(fn, causal=causal, short=short))
        for short in (False, True)
    )
    if ranges is None or max(t, s) > UNROLL_LIMIT or t < SHORT_SAMPLES_FROM:
        return unrolled(args)
    return lax.cond(_short_samples(ranges, s, causal), loop, unrolled, args)


def _few_rows(fn, args):
    """Call ``fn(*args)`` on all rows, or on a CPU on as many at a time as the cache holds."""
    rows, groups, t = args[0].shape[:3]
    keys = args[1].shape[1]
    looped = max(t, keys) > UNROLL_LIMIT
    queries, block = (LOOP_BLOCK_Q, LOOP_BLOCK_K) if looped else (BLOCK_Q, keys)
    block = groups * min(queries, t) * block * 4
    few = max(1, CPU_BLOCK_BYTES // block)
    few = max(n for n in range(1, min(few, rows) + 1) if rows % n == 0)
    if jax.default_backend() != "cpu" or few == rows:
        return fn(*args)
    split = jax.tree.map(lambda x: x.reshape(rows // few, few, *x.shape[1:]), args)
    out = lax.map(lambda some: fn(*some), split)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), out)


# --- One block ---------------------------------------------------------------------------------


def _scores(q, k, ranges, slopes, i0, j0, causal):
    """Return float32 scores [r, g, bq, bk] of the block at (i0, j0), -inf where hidden."""
    s = jnp.einsum("rgqh,rsh->rgqs", q, k, preferred_element_type=jnp.float32)
    i, j = i0 + jnp.arange(q.shape[2])[:, None], j0 + jnp.arange(k.shape[1])[None]
    if slopes is not None:
        s -= slopes[:, :, None, None] * (i - j).astype(jnp.float32)
    if ranges is not None:
        ranges = tuple(r[:, None, :, None] for r in ranges)
    seen = _seen(i, j, ranges, causal and _may_hide(i0, j0, k.shape[1]))
    return s if seen is None else jnp.where(seen, s, -jnp.inf)


def _may_hide(i0, j0, bk):
    """Tell whether causality may hide any of the keys [j0, j0 + bk) from the query i0."""
    return not (isinstance(i0, int) and isinstance(j0, int) and j0 + bk <= i0 + 1)


def _seen(i, j, ranges, causal):
    """Return which pairs of query i and key j see each other, or None if all do."""
    if ranges is None:
        return j <= i if causal else None
    return (j >= ranges[0]) & (j < ranges[1])


def _finite(m):
    return jnp.where(jnp.isneginf(m), 0.0, m)


def _forward_block(q, k, v, ranges, slopes, i0, j0, causal, carry):
    """Fold one block of keys into the running (accumulator, max, sum) of a block of queries."""
    acc, m, total = carry
    s = _scores(q, k, ranges, slopes, i0, j0, causal)
    m_new = jnp.maximum(m, s.max(-1))
    p = jnp.exp(s - _finite(m_new)[..., None])
    keep = jnp.exp(m - _finite(m_new))
    pv = jnp.einsum("rgqs,rsh->rgqh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return acc * keep[..., None] + pv, m_new, total * keep + p.sum(-1)


def _first_block(q, k, v, ranges, slopes, i0, j0, causal):
    """The same for the first block of keys, where there is nothing to rescale."""
    s = _scores(q, k, ranges, slopes, i0, j0, causal)
    m = s.max(-1)
    p = jnp.exp(s - _finite(m)[..., None])
    pv = jnp.einsum("rgqs,rsh->rgqh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return pv, m, p.sum(-1)


def _finish(carry, dtype):
    acc, m, total = carry
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    out = (acc / safe[..., None]).astype(dtype)
    # +inf, not -inf, for an empty row: exp(score - inf) is 0 in the backward pass, without a case.
    return out, jnp.where(empty, jnp.inf, m + jnp.log(safe))


def _backward_block(q, k, v, ranges, slopes, lse, delta, grad, i0, j0, causal):
    """Return (dq, dk, dv) of one block, in float32.

    Everything [t, s] is kept as [s, t]: then each of the five matmuls reads its operands as they
    lie, and only the small ones (k, dq) are ever transposed.
    """
    f32 = jnp.float32
    s = jnp.einsum("rsh,rgqh->rsgq", k, q, preferred_element_type=f32)
    i = i0 + jnp.arange(q.shape[2])[None, None]
    j = j0 + jnp.arange(k.shape[1])[:, None, None]
    if slopes is not None:
        s -= slopes[:, None, :, None] * (i - j).astype(f32)
    if ranges is not None:
        ranges = tuple(r[:, None, None] for r in ranges)
    seen = _seen(i, j, ranges, causal and _may_hide(i0, j0, k.shape[1]))
    s = s if seen is None else jnp.where(seen, s, -jnp.inf)
    p = jnp.exp(s - lse[:, None])
    dp = jnp.einsum("rsh,rgqh->rsgq", v, grad, preferred_element_type=f32)
    ds = (p * (dp - delta[:, None])).astype(q.dtype)
    dv = jnp.einsum("rsgq,rgqh->rsh", p.astype(q.dtype), grad, preferred_element_type=f32)
    dk = jnp.einsum("rsgq,rgqh->rsh", ds, q, preferred_element_type=f32)
    if jax.default_backend() == "cpu":  # which XLA cannot multiply so in fewer bits: it raises
        k, ds = k.astype(f32), ds.astype(f32)  # exact, as its sums are
    dq = jnp.einsum("rhs,rsgq->rhgq", k.swapaxes(1, 2), ds, preferred_element_type=f32)
    return dq.transpose(0, 2, 3, 1), dk, dv


# --- All blocks --------------------------------------------------------------------------------


def _rows(ranges, i0, bq):
    if ranges is None:
        return None
    return tuple(lax.dynamic_slice_in_dim(r, i0, bq, axis=1) for r in ranges)


def _forward(q, k, v, ranges, slopes, causal, short):
    t, s = q.shape[2], k.shape[1]
    if short:
        return _forward_loop(q, k, v, ranges, slopes, causal, (SHORT_BLOCK, SHORT_BLOCK))
    if max(t, s) > UNROLL_LIMIT and t > 1:
        return _forward_loop(q, k, v, ranges, slopes, causal, (LOOP_BLOCK_Q, LOOP_BLOCK_K))
    return _forward_unrolled(q, k, v, ranges, slopes, causal)


def _short_samples(ranges, s, causal):
    """Tell whether loops over small blocks meet less than half of the pairs that chunks do.

    A pair takes them up to 1.8 times as long.
    """
    t = ranges[0].shape[1]
    *_, lo, hi = _block_ranges(ranges, s, SHORT_BLOCK, SHORT_BLOCK)
    met = jnp.maximum(hi - lo, 0).astype(jnp.float32).mean(0).sum() * SHORT_BLOCK * SHORT_BLOCK
    ends = (min(i0 + BLOCK_Q, t) for i0 in range(0, t, BLOCK_Q))
    return 2 * met < BLOCK_Q * sum(min(s, end) if causal else s for end in ends)


def _forward_unrolled(q, k, v, ranges, slopes, causal):
    t, s = q.shape[2], k.shape[1]
    outs, lses = [], []
    for i0 in range(0, t, BLOCK_Q):
        i1 = min(i0 + BLOCK_Q, t)
        stop = min(s, i1) if causal else s
        block = (q[:, :, i0:i1], k[:, :stop], v[:, :stop], _rows(ranges, i0, i1 - i0))
        out, lse = _finish(_first_block(*block, slopes, i0, 0, causal), q.dtype)
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, 2), jnp.concatenate(lses, 2)


def _backward(q, k, v, ranges, slopes, out, lse, grad, causal, short):
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), -1)
    t, s = q.shape[2], k.shape[1]
    args = (q, k, v, ranges, slopes, lse, delta, grad, causal)
    if short:
        return _backward_loop(*args, (SHORT_BLOCK, SHORT_BLOCK))
    if max(t, s) > UNROLL_LIMIT:
        return _backward_loop(*args, (LOOP_BLOCK_Q, LOOP_BLOCK_K))
    return _backward_unrolled(*args)


def _backward_unrolled(q, k, v, ranges, slopes, lse, delta, grad, causal):
    t, s = q.shape[2], k.shape[1]
    dqs, dk, dv = [], None, None
    # From the last chunk of queries to the first: the first one touched sees every key, so the
    # later, shorter ones are added into a prefix of what is there.
    for i0 in reversed(range(0, t, BLOCK_Q)):
        rows = slice(i0, min(i0 + BLOCK_Q, t))
        stop = min(s, rows.stop) if causal else s
        dq, dk_i, dv_i = _backward_block(
            q[:, :, rows], k[:, :stop], v[:, :stop], _rows(ranges, i0, rows.stop - i0), slopes,
            lse[:, :, rows], delta[:, :, rows], grad[:, :, rows], i0, 0, causal,
        )  # fmt: skip
        dqs.append(dq)
        if dk is None:
            tail = ((0, 0), (0, s - stop), (0, 0))
            dk, dv = jnp.pad(dk_i, tail), jnp.pad(dv_i, tail)
        else:
            dk, dv = dk.at[:, :stop].add(dk_i), dv.at[:, :stop].add(dv_i)
    dq = jnp.concatenate(dqs[::-1], 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


# --- Long sequences: the same blocks in loops ----------------------------------------------------


def _pad_to(x, size, axis, value=0):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad, constant_values=value)


def _loop_setup(q, k, v, ranges, causal, blocks):
    """Pad to whole blocks and return them with each query block's key blocks, of any row."""
    t, s = q.shape[2], k.shape[1]
    bq, bk = min(blocks[0], t), min(blocks[1], s)
    sp = -(-s // bk) * bk
    b = q.shape[0]
    if ranges is None:
        end = jnp.arange(1, t + 1) if causal else jnp.full(t, s)
        ranges = (jnp.zeros((b, t), jnp.int32), jnp.broadcast_to(end, (b, t)).astype(jnp.int32))
    start, end, lo, hi = _block_ranges(ranges, s, bq, bk)
    q, k, v = _pad_to(q, start.shape[1], 2), _pad_to(k, sp, 1), _pad_to(v, sp, 1)
    return q, k, v, (start, end), lo.min(0), hi.max(0), bq, bk


def _block_ranges(ranges, s, bq, bk):
    """Return ranges of whole query blocks, and each block's first and last key block, by row."""
    b, t = ranges[0].shape
    tp, sp = -(-t // bq) * bq, -(-s // bk) * bk
    start, end = (_pad_to(r, tp, 1) for r in ranges)  # padded queries: empty range [0, 0)
    seen = start < end
    lo = jnp.where(seen, start, sp).reshape(b, tp // bq, bq).min(2) // bk
    hi = -(-jnp.where(seen, end, 0).reshape(b, tp // bq, bq).max(2) // bk)
    return start, end, lo, hi


def _forward_loop(q, k, v, ranges, slopes, causal, blocks):
    t, dtype = q.shape[2], q.dtype
    q, k, v, ranges, lo, hi, bq, bk = _loop_setup(q, k, v, ranges, causal, blocks)

    def query_block(i):
        qi = lax.dynamic_slice_in_dim(q, i * bq, bq, 2)
        ri = _rows(ranges, i * bq, bq)

        def key_block(j, carry):
            kj, vj = (lax.dynamic_slice_in_dim(x, j * bk, bk, 1) for x in (k, v))
            return _forward_block(qi, kj, vj, ri, slopes, i * bq, j * bk, False, carry)

        stats = jnp.full(qi.shape[:-1], -jnp.inf, jnp.float32)
        carry = (jnp.zeros(qi.shape, jnp.float32), stats, jnp.zeros_like(stats))
        return _finish(lax.fori_loop(lo[i], hi[i], key_block, carry), dtype)

    out, lse = lax.map(query_block, jnp.arange(q.shape[2] // bq))
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])  # noqa: E731
    return join(out)[:, :, :t], join(lse)[:, :, :t]


def _backward_loop(q, k, v, ranges, slopes, lse, delta, grad, causal, blocks):
    t, s = q.shape[2], k.shape[1]
    dtypes = (q.dtype, k.dtype, v.dtype)
    q, k, v, ranges, lo, hi, bq, bk = _loop_setup(q, k, v, ranges, causal, blocks)
    tp = q.shape[2]
    lse, delta, grad = _pad_to(lse, tp, 2, jnp.inf), _pad_to(delta, tp, 2), _pad_to(grad, tp, 2)

    def query_block(carry, i):
        cut = lambda x: lax.dynamic_slice_in_dim(x, i * bq, bq, 2)  # noqa: E731
        qi, lse_i, delta_i, grad_i = cut(q), cut(lse), cut(delta), cut(grad)
        ri = _rows(ranges, i * bq, bq)

        def key_block(j, carry):
            dq, dk, dv = carry
            kj, vj = (lax.dynamic_slice_in_dim(x, j * bk, bk, 1) for x in (k, v))
            dq_j, dk_j, dv_j = _backward_block(
                qi, kj, vj, ri, slopes, lse_i, delta_i, grad_i, i * bq, j * bk, False
            )
            dk, dv = (
                lax.dynamic_update_slice_in_dim(
                    x, lax.dynamic_slice_in_dim(x, j * bk, bk, 1) + d, j * bk, 1
                )
                for x, d in ((dk, dk_j), (dv, dv_j))
            )
            return dq + dq_j, dk, dv

        dq, dk, dv = lax.fori_loop(
            lo[i], hi[i], key_block, (jnp.zeros(qi.shape, jnp.float32), *carry)
        )
        return (dk, dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(tp // bq))
    dq = jnp.moveaxis(dq, 0, 2).reshape(q.shape)[:, :, :t]
    return dq.astype(dtypes[0]), dk[:, :s].astype(dtypes[1]), dv[:, :s].astype(dtypes[2])
