"""The train step: a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mmjax.ops import xent
from mmjax.train.loss import loss_sum
from mmjax.train.state import TrainState, shardings
from mmjax.types import Batch


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate: int = 1,
    loss_chunk: int = xent.CHUNK,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return step(state, frozen, batch) -> (state, metrics).

    accumulate: microbatches a batch is cut into, row by row. Gradients and losses are summed over
        them and divided once by the number of target tokens of the whole batch, so the result
        does not depend on how targets fall into microbatches.
    """

    def sums(params, frozen, batch):
        return loss_sum(nnx.merge(graphdef, params, frozen), batch, chunk=loss_chunk)

    grad_fn = jax.value_and_grad(sums, has_aux=True)

    def accumulated(params, frozen, batch):
        if accumulate == 1:
            return grad_fn(params, frozen, batch)
        # Strided, not blocked: each microbatch keeps its rows spread over all devices.
        micro = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def body(total, piece):
            return jax.tree.map(jnp.add, total, grad_fn(params, frozen, piece)), None

        zero = jnp.zeros((), jnp.float32)
        start = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(body, start, micro)[0]

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch):
        (total, count), grads = accumulated(state.params, frozen, batch)
        scale = 1.0 / jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": total * scale,
            "grad_norm": optax.tree.norm(grads),
            "lr": schedule(state.step),
            "target_tokens": count,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
        }
        return TrainState(state.step + 1, params, opt), metrics

    return train_step


def compile_step(step: Callable, state: TrainState) -> Callable:
    """Jit a train step with the state donated and its shardings pinned.

    state: abstract or real. Without pinned output shardings the second call would compile again.
    """
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), None))
