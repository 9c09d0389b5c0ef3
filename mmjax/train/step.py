"""The train step: a pure function of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mmjax.nn.dropout import dropout_key
from mmjax.train.loss import LossOptions, loss_by_source, targets_by_source
from mmjax.train.rows import Rows, masked, restored
from mmjax.train.state import TrainState, shardings
from mmjax.types import Batch


@dataclasses.dataclass(frozen=True)
class BadStepSettings:
    """What happens at a bad step: its loss or gradient is no number, or its loss explodes.

    action: ``stop`` ends the run and names the step, its records and the last checkpoint; ``skip``
    leaves parameters and optimizer as they were and goes on, ``limit`` times in a run. max_loss: a
    mean loss above it has exploded; a uniform guess among 262,144 tokens has 12.5.
    """

    action: Literal["stop", "skip"] = "stop"
    limit: int = 10
    max_loss: float = 100.0


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    loss: LossOptions = LossOptions(),  # noqa: B008
    accumulate: int = 1,
    seed: int = 0,
    rows: Mapping[str, Rows] = MappingProxyType({}),
    bad_steps: BadStepSettings = BadStepSettings(),
    rates: Mapping[str, float] = MappingProxyType({}),
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return step(state, frozen, batch) -> (state, metrics).

    accumulate: microbatches a batch is cut into, row by row. Gradients and losses are summed over
        them and divided once by the number of target tokens of the whole batch, so the result
        does not depend on how targets fall into microbatches.
    seed: of the adapters' dropout, whose masks are functions of (seed, step, microbatch, layer).
    rows: tables of which some rows alone are trained, by name; see ``mmjax.train.rows``.
    bad_steps: a loss above ``max_loss``, or a loss or gradient that is no number, makes a step bad.
        With ``skip`` it leaves parameters and optimizer as they were; its learning rate is gone.
        The caller stops, and counts to ``limit``.
    schedule, rates: the learning rate, and those of some parameters as shares of it. They are only
        told: ``tx`` applies its own.

    The metrics are scalars, and ``source_loss``, ``source_targets`` float32[sources].
    """

    gradients = _summed_gradients(graphdef, accumulate, loss)

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        share = _target_weights(batch, loss)
        (total, (totals, counts)), grads = gradients(state.params, frozen, batch, key, share)
        count = counts.sum()
        scale = 1.0 / jnp.maximum(count, 1.0) if share is None else jnp.float32(1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, masked(rows, grads))
        updates, opt = tx.update(grads, state.opt, state.params)
        params = restored(rows, optax.apply_updates(state.params, updates), state.params)
        mean, norm = total * scale, optax.tree.norm(grads)
        good = (mean <= bad_steps.max_loss) & jnp.isfinite(mean) & jnp.isfinite(norm)
        if bad_steps.action == "skip":
            params, opt = _unless_bad(good, (params, opt), (state.params, state.opt))
        rate = schedule(state.step)
        metrics = {
            "loss": mean,
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


def _summed_gradients(graphdef: nnx.GraphDef, accumulate: int, loss: LossOptions) -> Callable:
    """Return gradients(params, frozen, batch, key, share) -> ((loss, (losses, targets)), grads).

    All of them are sums over the batch: losses and targets float32[sources], the loss that of all
    sources, each times its ``share`` where there is one.
    """

    def sums(params, frozen, batch, key, share):
        with dropout_key(key):
            model = nnx.merge(graphdef, params, frozen)
            totals, counts = loss_by_source(model, batch, loss.num_sources, chunk=loss.chunk)
        return (totals if share is None else totals * share).sum(), (totals, counts)

    of_microbatch = jax.value_and_grad(sums, has_aux=True)
    if accumulate == 1:
        return of_microbatch

    def accumulated(params, frozen, batch, key, share):
        # Strided, not blocked: each microbatch keeps its rows spread over all devices.
        micro = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def body(index, total):
            piece = jax.tree.map(lambda x: x[index], micro)
            got = of_microbatch(params, frozen, piece, jax.random.fold_in(key, index), share)
            return jax.tree.map(jnp.add, total, got)

        # In float32, whatever the parameters are kept in: bfloat16 has no room for many terms.
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        zero = jnp.zeros((), jnp.float32)
        each = jnp.zeros(loss.num_sources, jnp.float32)
        start = ((zero, (each, each)), zeros)
        # XLA is not to see how many there are: on several GPUs it would begin the next microbatch
        # in the last one's collectives, and hold the activations of two.
        return jax.lax.fori_loop(0, jax.lax.optimization_barrier(accumulate), body, start)

    return accumulated


def _target_weights(batch: Batch, loss: LossOptions) -> Array | None:
    """Return what a target of each source weighs, float32[sources]; None where all weigh alike.

    It is known before any microbatch runs, so the loss of a batch can be summed over them.
    """
    if loss.weights is None:
        return None
    weights = jnp.asarray(loss.weights, jnp.float32)
    return weights / jnp.maximum(targets_by_source(batch, loss.num_sources), 1.0)


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
