"""The training loss: cross-entropy over supervised positions, and nothing but those."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.ops import xent
from mmjax.parallel.context import take_on_length
from mmjax.parallel.sharding import constrain
from mmjax.types import Batch


def loss_sum(model: nnx.Module, batch: Batch, *, chunk: int = xent.CHUNK) -> tuple[Array, Array]:
    """Return (sum of negative log-likelihoods, number of targets) of a batch, both float32.

    Sums, not means: microbatches and hosts add up, and one division ends it.
    """
    totals, counts = loss_by_source(model, batch, 1, chunk=chunk)
    return totals[0], counts[0]


def loss_by_source(
    model: nnx.Module, batch: Batch, num_sources: int, *, chunk: int = xent.CHUNK
) -> tuple[Array, Array]:
    """Return the same sums for each source, both float32[sources], in one pass.

    Hidden states are asked for at ``target_index - 1`` alone, so that the head, and where it pays
    the last layer, run on targets alone. ``batch["target_source"]`` is only read where there are
    several sources.
    """
    index = batch["target_index"]  # [b, targets]
    weights = (index > 0).astype(jnp.float32)[..., None]
    if num_sources > 1:
        weights *= batch["target_source"][..., None] == jnp.arange(num_sources)
    picked = constrain(model(batch, jnp.maximum(index - 1, 0)), "batch", None, "embed")
    labels = take_on_length(batch["tokens"], jnp.maximum(index, 0))
    weights = weights.reshape(-1, num_sources)
    totals = xent.chunked_nll(
        model.logits,
        picked.reshape(-1, picked.shape[-1]),
        labels.reshape(-1),
        weights,
        chunk=chunk,
    )
    return totals, weights.sum(0)
