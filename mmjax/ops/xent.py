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
    """Return the weighted sum of negative log-likelihoods without the logits of all tokens.

    head: maps [c, d] to logits [c, v]; its parameters may be traced, gradients reach them.
    hidden: [r, d]; targets: int32[r]; weights: float32[r], 0 for padding.
    chunk: rows whose logits exist at one time. They are computed again in the backward pass, one
        chunk at a time, so [r, v] exists in neither direction. Chunks go over tokens and not over
        the vocabulary: the matmuls stay large.
    """
    rows = hidden.shape[0]
    if rows <= chunk:
        return jnp.sum(nll(head(hidden), targets) * weights)
    pad = -rows % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0)))
    targets, weights = jnp.pad(targets, (0, pad)), jnp.pad(weights, (0, pad))

    @jax.checkpoint
    def one(h, t, w):
        return jnp.sum(nll(head(h), t) * w)

    def body(total, xs):
        return total + one(*xs), None

    parts = [a.reshape(-1, chunk, *a.shape[1:]) for a in (hidden, targets, weights)]
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]
