"""Attention from one stream to another: queries of the first, keys and values of the second."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.ops.attention import attention
from mmjax.ops.decode import decode_attention
from mmjax.parallel.sharding import constrain


class CrossAttention(nnx.Module):
    """Multi-head attention of d wide queries to d_source wide keys; no biases, no positions.

    prefix: stands before the names of its maps, ``attn.q`` and so on, in ``LoRA.targets``.
    """

    def __init__(
        self,
        d: int,
        d_source: int,
        n: int,
        h: int,
        *,
        dtypes: DTypes,
        init_std: float,
        lora: LoRA | None,
        rngs: nnx.Rngs,
        prefix: str = "",
        implementation: str = "auto",
    ):
        shared = dict(bias=False, dtypes=dtypes, init_std=init_std, lora=lora, rngs=rngs)
        axes = ("embed", "heads", "head_dim")
        self.implementation = implementation
        self.q = Linear((d,), (n, h), axes, name=f"{prefix}attn.q", **shared)
        self.k = Linear((d_source,), (n, h), axes, name=f"{prefix}attn.k", **shared)
        self.v = Linear((d_source,), (n, h), axes, name=f"{prefix}attn.v", **shared)
        out = (n, h), (d,), ("heads", "head_dim", "embed")
        self.o = Linear(*out, name=f"{prefix}attn.o", **shared)

    def keys_values(self, source: Array) -> tuple[Array, Array]:
        """Return the keys and values of [b, s, d_source], each [b, s, n, h]."""
        k, v = (checkpoint_name(a, "qkv") for a in (self.k(source), self.v(source)))
        return k, v

    def __call__(
        self,
        x: Array,
        k: Array,
        v: Array,
        k_start: Array | None = None,
        k_end: Array | None = None,
        uniform: Array | None = None,
        *,
        times: Array | None = None,
    ) -> Array:
        """Map [b, t, d] to [b, t, d].

        k, v: of ``keys_values``. k_start, k_end: int32[b, t], the keys a query sees; an empty
        range gives 0. uniform: bool[b, t], queries that weigh all keys of their range alike.
        times: a trained number that what is returned is multiplied by; see ``mmjax.nn.mlp.MLP``.
        """
        q = checkpoint_name(self.q(x), "qkv")
        if uniform is not None:
            q = jnp.where(uniform[..., None, None], 0, q)  # equal scores
        q = constrain(q, "batch", "length", "heads", None)
        out = attention(
            q, k, v, k_start=k_start, k_end=k_end, causal=False, implementation=self.implementation
        )
        out = constrain(out, "batch", "length", "heads", None)
        return self.o(out if times is None else times * out)

    def decode(
        self, x: Array, k: Array, v: Array, length: Array, *, times: Array | None = None
    ) -> Array:
        """Map one token a row, [b, 1, d], to [b, 1, d].

        k, v: [b, n, s, h], heads before length. length: int32[b], how many of the keys are seen.
        times: as for a call.
        """
        out = decode_attention(self.q(x)[:, 0], k, v, length)[:, None]
        return self.o(out if times is None else times * out)
