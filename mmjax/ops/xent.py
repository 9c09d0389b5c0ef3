"""Cross-entropy of a language-model head, a chunk of tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 1024


def nll(logits: Array, targets: Array) -> Array:
    """Return the negative log-likelihood, float32[...], of targets int[...] under [..., v]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def chunked_nll(
    head: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    weights: Array,
    *,
    chunk: int = CHUNK,
) -> Array:
    """Return weighted sums of negative log-likelihoods without the logits of all tokens.

    head: maps [c, d] to logits [c, v]; its parameters may be traced, gradients reach them.
    hidden: [r, d]; targets: int32[r]; weights: float32[r], 0 for padding, gives one sum, and
        float32[r, sums] several of them in one pass.
    chunk: rows whose logits exist at one time. They are computed again in the backward pass, one
        chunk at a time, so [r, v] exists in neither direction. Chunks go over tokens and not over
        the vocabulary: the matmuls stay large.
    """
    rows = hidden.shape[0]
    if rows <= chunk:
        return _weighted(nll(head(hidden), targets), weights)
    pad = -rows % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0)))
    targets = jnp.pad(targets, (0, pad))
    weights = jnp.pad(weights, ((0, pad), *[(0, 0)] * (weights.ndim - 1)))

    @jax.checkpoint
    def one(h, t, w):
        return _weighted(nll(head(h), t), w)

    def body(total, xs):
        return total + one(*xs), None

    parts = [a.reshape(-1, chunk, *a.shape[1:]) for a in (hidden, targets, weights)]
    return jax.lax.scan(body, jnp.zeros(weights.shape[1:], jnp.float32), parts)[0]


def _weighted(losses: Array, weights: Array) -> Array:
    """Sum losses [r] under weights [r] or [r, sums]; no matmul, which may round to TF32."""
    return jnp.sum(losses.reshape(-1, *[1] * (weights.ndim - 1)) * weights, axis=0)
