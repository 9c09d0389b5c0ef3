"""The forward pass of a loaded model, compiled once for a model's shape and a batch's."""

from functools import partial

import numpy as np
from flax import nnx

from mmjax.parallel.mesh import use


def logits(ours, batch):
    """Return the logits [b, t, v] of a batch."""
    with use(ours.mesh):
        return np.array(_logits(ours.model, batch))


# One function for all tests: what is compiled is kept by function and shapes.
@partial(nnx.jit, graph=False)
def _logits(model, batch):
    return model.logits(model(batch))
