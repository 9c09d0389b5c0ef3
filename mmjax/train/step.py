"""The train step: a pure function of state and batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mmjax.nn.dropout import dropout_key
from mmjax.ops import xent
from mmjax.train.loss import loss_by_source, targets_by_source
from mmjax.train.rows import Rows, masked, restored
from mmjax.train.state import TrainState, shardings
from mmjax.types import Batch


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate: int = 1,
    loss_chunk: int = xent.CHUNK,
    seed: int = 0,
    num_sources: int = 1,
    max_loss: float = math.inf,
    skip_bad: bool = False,
    rows: Mapping[str, Rows] = MappingProxyType({}),
    source_weights: Sequence[float] | None = None,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return step(state, frozen, batch) -> (state, metrics).

    accumulate: microbatches a batch is cut into, row by row. Gradients and losses are summed over
        them and divided once by the number of target tokens of the whole batch, so the result
        does not depend on how targets fall into microbatches.
    seed: of the adapters' dropout, whose masks are functions of (seed, step, microbatch, layer).
    num_sources: datasets whose losses are told apart, by ``batch["target_source"]``.
    max_loss: a loss above it, or a loss or gradient that is no number, makes a step bad.
    skip_bad: a bad step leaves parameters and optimizer as they were; its learning rate is gone.
    rows: tables of which some rows alone are trained, by name; see ``mmjax.train.rows``.
    source_weights: the loss is then sum_s w_s mean_s, each mean over the targets of its own source
        in the whole batch, not the mean over all of them; a source without any adds nothing.
    rates: learning rates of some parameters as shares of the schedule's; they are only told.

    The metrics are scalars, and ``source_loss``, ``source_targets`` float32[sources].
    """

    gradients = _summed_gradients(graphdef, accumulate, loss_chunk, num_sources)

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        share = _target_weights(batch, source_weights, num_sources)
        (total, (totals, counts)), grads = gradients(state.params, frozen, batch, key, share)
        count = counts.sum()
        scale = 1.0 / jnp.maximum(count, 1.0) if share is None else jnp.float32(1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, masked(rows, grads))
        updates, opt = tx.update(grads, state.opt, state.params)
        params = restored(rows, optax.apply_updates(state.params, updates), state.params)
        loss, norm = total * scale, optax.tree.norm(grads)
        good = (loss <= max_loss) & jnp.isfinite(loss) & jnp.isfinite(norm)
        if skip_bad:
            params, opt = _unless_bad(good, (params, opt), (state.params, state.opt))
        rate = schedule(state.step)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            **{f"lr/{name}": rate * part for name, part in rates.items()},
            **_row_use(batch),
            "target_tokens": count,
            "bad": ~good,
            "source_loss": totals / jnp.maximum(counts, 1.0),
            "source_targets": counts,
        }
        return TrainState(state.step + 1, params, opt), metrics

    return train_step


def _summed_gradients(
    graphdef: nnx.GraphDef, accumulate: int, loss_chunk: int, num_sources: int
) -> Callable:
    """Return gradients(params, frozen, batch, key, share) -> ((loss, (losses, targets)), grads).

    All of them are sums over the batch: losses and targets float32[sources], the loss that of all
    sources, each times its ``share`` where there is one.
    """

    def sums(params, frozen, batch, key, share):
        with dropout_key(key):
            model = nnx.merge(graphdef, params, frozen)
            totals, counts = loss_by_source(model, batch, num_sources, chunk=loss_chunk)
        return (totals if share is None else totals * share).sum(), (totals, counts)

    of_microbatch = jax.value_and_grad(sums, has_aux=True)
    if accumulate == 1:
        return of_microbatch

    def accumulated(params, frozen, batch, key, share):
        # Strided, not blocked: each microbatch keeps its rows spread over all devices.
        micro = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def body(total, xs):
            index, piece = xs
            got = of_microbatch(params, frozen, piece, jax.random.fold_in(key, index), share)
            return jax.tree.map(jnp.add, total, got), None

        # In float32, whatever the parameters are kept in: bfloat16 has no room for many terms.
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        zero = jnp.zeros((), jnp.float32)
        each = jnp.zeros(num_sources, jnp.float32)
        start = ((zero, (each, each)), zeros)
        return jax.lax.scan(body, start, (jnp.arange(accumulate), micro))[0]

    return accumulated


def _target_weights(
    batch: Batch, source_weights: Sequence[float] | None, num_sources: int
) -> Array | None:
    """Return what a target of each source weighs, float32[sources]; None where all weigh alike.

    It is known before any microbatch runs, so the loss of a batch can be summed over them.
    """
    if source_weights is None:
        return None
    weights = jnp.asarray(source_weights, jnp.float32)
    return weights / jnp.maximum(targets_by_source(batch, num_sources), 1.0)


def _unless_bad(good: Array, new, old):
    """Return the new trees where a step is good, else the old ones.

    The schedule of the learning rate counts a skipped step all the same: it ends with the run, and
    what is logged of it is what is applied.
    """

    def choose(a, b):
        if isinstance(a, optax.ScaleByScheduleState):
            return a
        return jax.tree.map(lambda x, y: jnp.where(good, x, y), a, b)

    return jax.tree.map(
        choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
    )


def _row_use(batch: Batch) -> dict[str, Array]:
    """Return how many tokens the rows of a batch hold, and the share that is padding."""
    tokens = jnp.sum(batch["segment_ids"] > 0)
    return {"tokens": tokens, "padding": 1.0 - tokens / batch["segment_ids"].size}


def compile_step(step: Callable, state: TrainState) -> Callable:
    """Jit a train step with the state donated and its shardings pinned.

    state: abstract or real. Without pinned output shardings the second call would compile again.
    """
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), None))
