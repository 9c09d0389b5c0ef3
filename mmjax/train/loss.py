"""The training loss: cross-entropy over supervised positions, and nothing but those."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.ops import xent
from mmjax.parallel.context import take_on_length
from mmjax.parallel.sharding import constrain
from mmjax.types import Batch, MMJaxError, nearest


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How the loss of a step is made of its targets.

    num_sources: datasets whose losses are told apart, by ``batch["target_source"]``. weights: the
    loss is then sum_s w_s mean_s, each mean over the targets of its own source in the whole batch,
    not the mean over all of them; a source without any adds nothing. chunk: targets that the head
    runs on at a time, None for ``chunk_rows`` of ``ops.xent``.
    """

    num_sources: int = 1
    weights: Sequence[float] | None = None
    chunk: int | None = None


def loss_sum(model: nnx.Module, batch: Batch, *, chunk: int | None = None) -> tuple[Array, Array]:
    """Return (sum of negative log-likelihoods, number of targets) of a batch, both float32.

    Sums, not means: microbatches and hosts add up, and one division ends it.
    """
    totals, counts = loss_by_source(model, batch, 1, chunk=chunk)
    return totals[0], counts[0]


def loss_by_source(
    model: nnx.Module, batch: Batch, num_sources: int, *, chunk: int | None = None
) -> tuple[Array, Array]:
    """Return the same sums for each source, both float32[sources], in one pass.

    Hidden states are asked for at ``target_index - 1`` alone, so that the head, and where it pays
    the last layer, run on targets alone. ``batch["target_source"]`` is only read where there are
    several sources.
    """
    index = batch["target_index"]  # [b, targets]
    weights = _weights(batch, num_sources)
    picked = constrain(model(batch, jnp.maximum(index - 1, 0)), "batch", None, "embed")
    labels = take_on_length(batch["tokens"], jnp.maximum(index, 0))
    weights = weights.reshape(-1, num_sources)
    totals = xent.chunked_nll(
        model.logits,
        picked.reshape(-1, picked.shape[-1]),
        labels.reshape(-1),
        weights,
        chunk=xent.chunk_rows(model.config.vocab_size, chunk),
    )
    return totals, weights.sum(0)


def targets_by_source(batch: Batch, num_sources: int) -> Array:
    """Return the number of targets of each source, float32[sources]."""
    return _weights(batch, num_sources).sum((0, 1))


def source_weights(
    weights: Mapping[str, float] | None, names: Sequence[str]
) -> tuple[float, ...] | None:
    """Return ``data.loss_weights`` in the order of the sources; None where there are none.

    Raises MMJaxError unless each source has one, a number from 0 up, and not all are 0.
    """
    if weights is None:
        return None
    for name in weights:
        if name not in names:
            raise MMJaxError(
                f"data.loss_weights names {name!r}, which is no source{nearest(name, names)}; "
                f"there are {', '.join(names)}"
            )
    if missing := [name for name in names if name not in weights]:
        raise MMJaxError(f"data.loss_weights has none for {', '.join(missing)}; give one for each")
    found = tuple(float(weights[name]) for name in names)
    if not any(found) or not all(w >= 0 and math.isfinite(w) for w in found):
        raise MMJaxError(
            f"data.loss_weights {dict(weights)}: each is a number from 0 up, one at least above 0"
        )
    return found


def _weights(batch: Batch, num_sources: int) -> Array:
    """Return 1 where a target is of a source, float32[b, targets, sources]."""
    weights = (batch["target_index"] > 0).astype(jnp.float32)[..., None]
    if num_sources > 1:
        weights *= batch["target_source"][..., None] == jnp.arange(num_sources)
    return weights
