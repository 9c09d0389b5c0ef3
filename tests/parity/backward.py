"""The loss of a loaded model and its gradients, of targets placed as a golden's labels say."""

import jax
import numpy as np
from flax import nnx

from mmjax.nn import paths
from mmjax.parallel.mesh import use
from mmjax.train.loss import loss_sum


def labelled(labels, lengths):
    """Return the places of each row's targets: labels are padded on the left, -100 is none."""
    rows = [np.flatnonzero(row[-n:] != -100) for row, n in zip(labels, lengths, strict=True)]
    return [t[t > 0] for t in rows]  # nothing stands before a first token


def place_targets(batch, rows):
    """Put the places of each row's targets into a batch, filled up with -1."""
    batch["target_index"] = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, some in enumerate(rows):
        batch["target_index"][row, : len(some)] = some


def loss_and_gradients(ours, batch):
    """Return the mean loss over a batch's targets and {our name: gradient}."""
    graphdef, params = nnx.split(ours.model)

    @jax.jit
    def loss(params, batch):
        total, count = loss_sum(nnx.merge(graphdef, params), batch)
        return total / count

    with use(ours.mesh):
        value, grads = jax.value_and_grad(loss)(params, batch)
    return float(value), {k: np.asarray(v) for k, v in paths.flatten(grads).items()}
