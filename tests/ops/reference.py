"""Dense attention in float64 with its gradients, and the masks to test against it."""

import jax.numpy as jnp
import numpy as np

from mmjax.ops import ranges


def _probabilities(q, k, start, end, causal, slopes):
    """Return float64 [b, n, t, s]; rows that see nothing are 0. k has as many heads as q."""
    scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    i, j = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])[None]
    if slopes is not None:
        scores -= np.asarray(slopes, np.float64)[None, :, None, None] * (i - j)
    seen = (j >= start[:, :, None]) & (j < end[:, :, None])
    if causal:
        seen &= j <= i
    seen = seen[:, None]
    scores = np.where(seen, scores, -np.inf)
    top = np.where(seen.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0)
    p = np.exp(scores - top)
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def _float64(*arrays):
    return tuple(np.asarray(x, np.float64) for x in arrays)


def reference(q, k, v, start, end, causal, slopes=None):
    """Dense attention in float64 with explicit masks; rows that see nothing give 0."""
    q, k, v = _float64(q, k, v)
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    return np.einsum("bnts,bsnh->btnh", _probabilities(q, k, start, end, causal, slopes), v)


def reference_gradients(q, k, v, grad, start, end, causal, slopes=None):
    """Return (dq, dk, dv) of ``sum(reference(q, k, v) * grad)`` in float64."""
    q, k, v, grad = _float64(q, k, v, grad)
    kv, groups, scale = k.shape[2], q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    k, v = np.repeat(k, groups, 2), np.repeat(v, groups, 2)
    p = _probabilities(q, k, start, end, causal, slopes)
    dp = np.einsum("btnh,bsnh->bnts", grad, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dk, dv = np.einsum("bnts,btnh->bsnh", ds, q), np.einsum("bnts,btnh->bsnh", p, grad)
    dk, dv = (x.reshape(*x.shape[:2], kv, groups, -1).sum(3) for x in (dk, dv))
    return np.einsum("bnts,bsnh->btnh", ds, k), dk, dv


def masks(kind, b, t, s):
    """Return (k_start, k_end, causal) of a named mask."""
    zero, full = np.zeros((b, t), np.int32), np.full((b, t), s, np.int32)
    rng = np.random.default_rng(0)
    if kind == "causal":
        return zero, full, True
    if kind == "full":
        return zero, full, False
    if kind == "packed":
        segments = np.sort(rng.integers(0, 5, (b, t)), axis=1)[:, ::-1].copy()
        return *(np.asarray(x) for x in ranges.from_segments(jnp.asarray(segments))), True
    if kind == "padded":
        return zero, rng.integers(1, s, b)[:, None] + zero, True
    if kind == "window":
        return np.maximum(np.arange(t)[None] - 6 + zero, 0), full, True
    if kind == "media":  # blocks of keys by image, and rows before the first image see nothing
        image = np.sort(rng.integers(0, 4, (b, t)), axis=1)
        return (image - 1) * (s // 4), image * (s // 4), False
    if kind == "random":  # any ranges, in no order, many empty, some outside [0, s]
        return rng.integers(-5, s + 5, (b, t)), rng.integers(-5, s + 5, (b, t)), False
    raise ValueError(kind)
