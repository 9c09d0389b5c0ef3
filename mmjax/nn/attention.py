"""Self-attention with rotary positions and an optional normalisation of queries and keys."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.nn import cache as kv_cache
from mmjax.nn import rope
from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.norm import LayerNorm
from mmjax.ops.attention import attention
from mmjax.ops.decode import decode_attention
from mmjax.parallel.context import take_on_length
from mmjax.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    cos, sin: rotary angles, [b, t, dims / 2]. k_start, k_end: key ranges int32[b, t] or None.
    length: int32[b], the filled part of the cache when decoding one token, else None.
    implementation: of attention, a name in ``mmjax.ops.attention.IMPLEMENTATIONS``.
    """

    cos: Array
    sin: Array
    k_start: Array | None = None
    k_end: Array | None = None
    length: Array | None = None
    implementation: str = dataclasses.field(default="auto", metadata=dict(static=True))

    def of_queries(self, at: Array) -> "Context":
        """Return the context of queries taken at int32[b, m]; causality becomes part of k_end."""
        cos, sin = take_on_length(self.cos, at), take_on_length(self.sin, at)
        start, end = (
            None if x is None else take_on_length(x, at) for x in (self.k_start, self.k_end)
        )
        end = at + 1 if end is None else jnp.minimum(end, at + 1)
        return Context(cos, sin, start, end, implementation=self.implementation)


class SelfAttention(nnx.Module):
    """Causal multi-head attention; keys and values may have fewer heads than queries."""

    def __init__(
        self,
        d: int,
        n: int,
        kv: int,
        h: int,
        *,
        qk_norm: bool,
        eps: float,
        dtypes: DTypes,
        init_std: float,
        lora: LoRA | None,
        rngs: nnx.Rngs,
    ):
        shared = dict(bias=True, dtypes=dtypes, init_std=init_std, lora=lora, rngs=rngs)
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.q = Linear((d,), (n, h), ("embed", "heads", "head_dim"), name="attn.q", **shared)
        self.k = Linear((d,), (kv, h), kv_axes, name="attn.k", **shared)
        self.v = Linear((d,), (kv, h), kv_axes, name="attn.v", **shared)
        self.o = Linear((n, h), (d,), ("heads", "head_dim", "embed"), name="attn.o", **shared)
        # One norm for all heads, over the head's dimensions, before the rotation (Persimmon).
        self.q_norm = LayerNorm(h, eps=eps, dtypes=dtypes) if qk_norm else None
        self.k_norm = LayerNorm(h, eps=eps, dtypes=dtypes) if qk_norm else None

    def __call__(
        self, x: Array, context: Context, layer: Array, cached=None, at: Array | None = None
    ):
        """Map [b, t, d] to [b, t, d].

        cached: (k, v), each [l, b, k, s, h], or None; with it also returns the updated pair.
        at: int32[b, m], the positions whose outputs [b, m, d] are wanted; None for all.
        """
        asking, queries = x, context
        if at is not None:
            asking, queries = take_on_length(x, at), context.of_queries(at)
        # Named before norm and rotation: those are cheap to compute again, a projection is not.
        q, k, v = (checkpoint_name(a, "qkv") for a in (self.q(asking), self.k(x), self.v(x)))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = constrain(rope.rotate(q, queries.cos, queries.sin), "batch", "length", "heads", None)
        k = rope.rotate(k, context.cos, context.sin)
        if cached is not None:
            cached = tuple(
                kv_cache.write(buffer, layer, context.length, new)
                for buffer, new in zip(cached, (k, v), strict=True)
            )
        if context.length is None:
            out = attention(
                q,
                k,
                v,
                k_start=queries.k_start,
                k_end=queries.k_end,
                causal=at is None,
                implementation=context.implementation,
            )
        else:  # one new token against the cache; its own key is in there by now
            k, v = (jax.lax.dynamic_index_in_dim(c, layer, 0, keepdims=False) for c in cached)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
            out = decode_attention(q[:, 0], k, v, context.length + 1)[:, None]
        out = self.o(constrain(out, "batch", "length", "heads", None))
        return out if cached is None else (out, cached)


def rope_dims(head_dim: int, fraction: float) -> int:
    """Return how many dimensions of a head are rotated, an even number."""
    return int(head_dim * fraction) // 2 * 2
