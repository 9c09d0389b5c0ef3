"""Normalisation layers; statistics in float32."""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mmjax.nn.linear import DTypes


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis with scale and bias (Ba et al. 2016)."""

    def __init__(self, d: int, *, eps: float, dtypes: DTypes):
        param = jnp.dtype(dtypes.param)
        self.eps, self.dtype = eps, dtypes.compute
        self.scale = nnx.Param(jnp.ones((d,), param), out_sharding=("norm",))
        self.bias = nnx.Param(jnp.zeros((d,), param), out_sharding=("norm",))

    def __call__(self, x: Array) -> Array:
        """Normalise [..., d]; returns the compute dtype."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * self.scale[...] + self.bias[...]).astype(self.dtype)
