"""Cross-entropy of a language-model head, a chunk of tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax import checkpoint_policies as policies
from jax.ad_checkpoint import checkpoint_name

from mmjax.parallel.sharding import constrain, shards

CHUNK = 1024
CHUNK_BYTES = 64 * 2**20


def chunk_rows(vocab_size: int, given: int | None = None) -> int:
    """Return how many rows' logits exist at one time: those given, else at least CHUNK.

    Of a small vocabulary as many as CHUNK_BYTES hold in float32: computing them a second time costs
    more than that memory is worth.
    """
    return max(CHUNK, CHUNK_BYTES // (4 * vocab_size)) if given is None else given


@jax.custom_vjp
def nll(logits: Array, targets: Array) -> Array:
    """Return the negative log-likelihood, float32[...], of targets int[...] under [..., v].

    The vocabulary may be cut over devices: what crosses them are maxima and sums, a number a row.
    """
    return _nll_forward(logits, targets)[0]


def _nll_forward(logits, targets):
    scores = logits.astype(jnp.float32)
    lse = checkpoint_name(jax.nn.logsumexp(scores, axis=-1), "xent_lse")
    picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return lse - picked, (logits, targets, lse)


def _nll_backward(residuals, grad):
    logits, targets, lse = residuals
    p = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
    # A comparison, not a scatter: the three fuse into one pass over the logits.
    is_target = jnp.arange(p.shape[-1], dtype=targets.dtype) == targets[..., None]
    d = grad[..., None] * jnp.where(is_target, p - 1.0, p)
    return d.astype(logits.dtype), None


nll.defvjp(_nll_forward, _nll_backward)


def chunked_nll(
    head: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    weights: Array,
    *,
    chunk: int,
) -> Array:
    """Return weighted sums of negative log-likelihoods without the logits of all tokens.

    head: maps [c, d] to logits [c, v]; its parameters may be traced, gradients reach them.
    hidden: [r, d]; targets: int32[r]; weights: float32[r], 0 for padding, gives one sum, and
        float32[r, sums] several of them in one pass.
    chunk: rows of a device whose logits exist at one time. With more of them the logits are
        computed again in the backward pass, one chunk at a time, so [r, v] exists in neither
        direction; the log-sum-exp is kept. Chunks go over tokens and not over the vocabulary: the
        matmuls stay large.

    Rows are cut over the axes that cut a batch and its length, and each chunk takes as many from
    every device: nobody waits, and the head's kernel travels, never the logits. Where fsdp cuts the
    kernel it travels for each chunk anew, so there the chunk is to be as large as memory allows.
    """
    ways = shards("targets", len(hidden))

    def loss(h, t, w):
        h, t, w = (constrain(a.reshape(-1, *a.shape[2:]), "targets") for a in (h, t, w))
        return _weighted(nll(head(h), t), w)

    hidden, targets, weights = (
        a.reshape(ways, -1, *a.shape[1:]) for a in (hidden, targets, weights)
    )
    if hidden.shape[1] <= chunk:
        return loss(hidden, targets, weights)
    one = jax.checkpoint(loss, policy=policies.save_only_these_names("xent_lse"))
    parts = [_chunks(a, chunk) for a in (hidden, targets, weights)]

    def body(total, xs):
        return total + one(*xs), None

    return jax.lax.scan(body, jnp.zeros(weights.shape[2:], jnp.float32), parts)[0]


def _chunks(a: Array, chunk: int) -> Array:
    """Cut [ways, rows, ...] into [chunks, ways, chunk, ...], filled up with zeros."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % chunk), *[(0, 0)] * (a.ndim - 2)))
    a = a.reshape(a.shape[0], -1, chunk, *a.shape[2:]).swapaxes(0, 1)
    return constrain(a, None, "targets")


def _weighted(losses: Array, weights: Array) -> Array:
    """Sum losses [r] under weights [r] or [r, sums]; no matmul, which may round to TF32."""
    return jnp.sum(losses.reshape(-1, *[1] * (weights.ndim - 1)) * weights, axis=0)
