"""Normalisation layers; statistics in float32."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mmjax.nn.linear import DTypes

if TYPE_CHECKING:
    from mmjax.nn.layer import LayerConfig


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis with scale and, unless told otherwise, bias (Ba et al. 2016)."""

    def __init__(self, d: int, *, eps: float, dtypes: DTypes, bias: bool = True):
        param = jnp.dtype(dtypes.param)
        self.eps, self.dtype = eps, dtypes.compute
        self.scale = nnx.Param(jnp.ones((d,), param), out_sharding=("norm",))
        self.bias = nnx.Param(jnp.zeros((d,), param), out_sharding=("norm",)) if bias else None

    def __call__(self, x: Array) -> Array:
        """Normalise [..., d]; returns the compute dtype."""
        scale = self.scale[...]
        bias = jnp.zeros_like(scale) if self.bias is None else self.bias[...]
        return _layer_norm(x.astype(jnp.float32), scale, bias, self.eps).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with scale (Zhang & Sennrich 2019).

    plus_one: multiply by 1 + scale, which then starts at 0 (Gemma).
    """

    def __init__(self, d: int, *, eps: float, dtypes: DTypes, plus_one: bool = False):
        self.eps, self.dtype, self.plus_one = eps, dtypes.compute, plus_one
        scale = jnp.full((d,), 0.0 if plus_one else 1.0, jnp.dtype(dtypes.param))
        self.scale = nnx.Param(scale, out_sharding=("norm",))

    def __call__(self, x: Array) -> Array:
        """Normalise [..., d]; returns the compute dtype."""
        x = x.astype(jnp.float32)
        rstd = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        # In float32 before the sum: 1 + scale in bfloat16 would round most of a small scale away.
        scale = self.scale[...].astype(jnp.float32)
        return (x * rstd * (1.0 + scale if self.plus_one else scale)).astype(self.dtype)


def make_norm(c: LayerConfig, *, dtypes: DTypes, width: int | None = None) -> LayerNorm | RMSNorm:
    """Build the norm that a block's config names, over its model width or another."""
    width = c.d_model if width is None else width
    if c.norm == "rms":
        return RMSNorm(width, eps=c.norm_eps, dtypes=dtypes, plus_one=c.norm_plus_one)
    return LayerNorm(width, eps=c.norm_eps, dtypes=dtypes, bias=c.norm_bias)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x, scale, bias, eps):
    mean = x.mean(-1, keepdims=True)
    rstd = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
    return (x - mean) * rstd * scale + bias, (x, mean, rstd, scale)


def _layer_norm_bwd(eps, residuals, grad):
    # By hand, because the derivative that JAX writes keeps three arrays of x's size, not one.
    x, mean, rstd, scale = residuals
    normed = (x - mean) * rstd
    tokens = tuple(range(x.ndim - 1))
    d_scale, d_bias = (grad * normed).sum(tokens), grad.sum(tokens)
    grad = grad * scale
    along = (grad * normed).mean(-1, keepdims=True)
    d_scale, d_bias = (d.astype(scale.dtype) for d in (d_scale, d_bias))  # one dtype, as made
    return rstd * (grad - grad.mean(-1, keepdims=True) - normed * along), d_scale, d_bias


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)
