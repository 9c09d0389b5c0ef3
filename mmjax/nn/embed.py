"""Token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.nn.linear import DTypes
from mmjax.parallel.sharding import constrain


class Embed(nnx.Module):
    """Look tokens up in a table [v, d]."""

    def __init__(self, v: int, d: int, *, dtypes: DTypes, init_std: float, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(init_std)
        table = normal(rngs.params(), (v, d), jnp.dtype(dtypes.param))
        self.dtype = dtypes.compute
        self.embedding = nnx.Param(table, out_sharding=("vocab", "embed"))

    def __call__(self, tokens: Array) -> Array:
        """Return [b, t, d] for int32[b, t]."""
        # Bring fsdp's shares together first: a look-up in a table cut on d would reshard twice.
        table = constrain(self.embedding[...], "vocab", "embed")
        return constrain(table[tokens].astype(self.dtype), "batch", "length", "embed")
