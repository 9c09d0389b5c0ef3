"""The training loss: cross-entropy over supervised positions, and nothing but those."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.ops import xent
from mmjax.parallel.sharding import constrain
from mmjax.types import Batch


def loss_sum(model: nnx.Module, batch: Batch, *, chunk: int = xent.CHUNK) -> tuple[Array, Array]:
    """Return (sum of negative log-likelihoods, number of targets) of a batch, both float32.

    Hidden states are gathered at ``target_index - 1`` before the head, so that the head runs on
    targets alone. Sums, not means: microbatches and hosts add up, and one division ends it.
    """
    index = batch["target_index"]  # [b, targets]
    weights = (index > 0).astype(jnp.float32)
    hidden = model(batch)
    at = jnp.maximum(index - 1, 0)
    picked = jnp.take_along_axis(hidden, at[..., None], axis=1)
    picked = constrain(picked, "batch", None, "embed")
    labels = jnp.take_along_axis(batch["tokens"], jnp.maximum(index, 0), axis=1)
    total = xent.chunked_nll(
        model.logits,
        picked.reshape(-1, picked.shape[-1]),
        labels.reshape(-1),
        weights.reshape(-1),
        chunk=chunk,
    )
    return total, weights.sum()
