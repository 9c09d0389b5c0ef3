"""Self-attention: rotary positions or ALiBi or neither, optional norms of queries and keys."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.nn import cache as kv_cache
from mmjax.nn import rope
from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.norm import LayerNorm, RMSNorm, make_norm
from mmjax.ops.attention import attention
from mmjax.ops.decode import decode_attention
from mmjax.parallel.context import take_on_length
from mmjax.parallel.sharding import constrain

if TYPE_CHECKING:
    from mmjax.nn.layer import LayerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    cos, sin: rotary angles, [b, t, dims / 2], or None. k_start, k_end: key ranges int32[b, t] or
    None. length: int32[b], the filled part of the cache when decoding one token, else None.
    slopes: of ALiBi, float32[n], or None. causal: hide later keys. window: how many keys a decoded
    token sees, its own among them, None for all; where there are more tokens, k_start tells.
    implementation: of attention, a name in ``mmjax.ops.attention.IMPLEMENTATIONS``.
    """

    cos: Array | None = None
    sin: Array | None = None
    k_start: Array | None = None
    k_end: Array | None = None
    length: Array | None = None
    slopes: Array | None = None
    causal: bool = dataclasses.field(default=True, metadata=dict(static=True))
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    implementation: str = dataclasses.field(default="auto", metadata=dict(static=True))

    def of_queries(self, at: Array) -> Context:
        """Return the context of queries taken at int32[b, m]; causality becomes part of k_end.

        A slope's distance then counts from the query's place among those taken: off by the same
        for all its keys, which softmax does not see.
        """
        cos, sin, start, end = (
            None if x is None else take_on_length(x, at)
            for x in (self.cos, self.sin, self.k_start, self.k_end)
        )
        if self.causal:
            end = at + 1 if end is None else jnp.minimum(end, at + 1)
        return dataclasses.replace(self, cos=cos, sin=sin, k_start=start, k_end=end, causal=False)


class SelfAttention(nnx.Module):
    """Multi-head attention; keys and values may have fewer heads than queries."""

    def __init__(
        self,
        c: LayerConfig,
        *,
        dtypes: DTypes,
        lora: LoRA | None,
        rngs: nnx.Rngs,
        prefix: str = "",
    ):
        shared = dict(dtypes=dtypes, init_std=c.init_std, lora=lora, rngs=rngs)
        d, n, kv, h = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        self.clip, self.interleaved = c.clip_qkv, c.rope_interleaved

        def project(name: str, heads: int, axis: str) -> Linear:
            axes = ("embed", axis, "head_dim")
            full = f"{prefix}attn.{name}"
            bias = c.qkv_bias and (name != "k" or c.k_bias)
            return Linear((d,), (heads, h), axes, name=full, bias=bias, **shared)

        self.q = project("q", n, "heads")
        self.k, self.v = project("k", kv, "kv_heads"), project("v", kv, "kv_heads")
        out = (n, h), (d,), ("heads", "head_dim", "embed")
        self.o = Linear(*out, name=f"{prefix}attn.o", bias=c.out_bias, **shared)
        # One norm for all heads, over the head's dimensions, before the rotation (Persimmon), or
        # one over the dimensions of all heads together (MPT-1B).
        widths = {"none": (0, 0), "head": (h, h), "model": (n * h, kv * h)}[c.qk_norm]
        of = dict(eps=c.norm_eps, dtypes=dtypes, bias=c.norm_bias)
        self.q_norm, self.k_norm = (LayerNorm(w, **of) if w else None for w in widths)
        self.sub_norm = make_norm(c, dtypes=dtypes, width=n * h) if c.sub_norm else None

    def __call__(
        self, x: Array, context: Context, layer: Array, cached=None, at: Array | None = None
    ):
        """Map [b, t, d] to [b, t, d].

        cached: the ``buffers`` of a Cache, or None; with it also returns them updated.
        at: int32[b, m], the positions whose outputs [b, m, d] are wanted; None for all.
        """
        asking, queries = x, context
        if at is not None:
            asking, queries = take_on_length(x, at), context.of_queries(at)
        # Named before norm and rotation: those are cheap to compute again, a projection is not.
        q, k, v = (checkpoint_name(a, "qkv") for a in (self.q(asking), self.k(x), self.v(x)))
        if self.clip is not None:
            q, k, v = (jnp.clip(a, -self.clip, self.clip) for a in (q, k, v))
        if self.q_norm is not None:
            q, k = _norm_heads(self.q_norm, q), _norm_heads(self.k_norm, k)
        if context.cos is not None:
            q = rope.rotate(q, queries.cos, queries.sin, interleaved=self.interleaved)
            k = rope.rotate(k, context.cos, context.sin, interleaved=self.interleaved)
        q = constrain(q, "batch", "length", "heads", None)
        if cached is not None:
            cached = kv_cache.store(cached, layer, context.length, k, v)
        if context.length is None:
            out = attention(
                q,
                k,
                v,
                k_start=queries.k_start,
                k_end=queries.k_end,
                causal=queries.causal,
                alibi_slopes=context.slopes,
                implementation=context.implementation,
            )
        else:  # one new token against the cache; its own key is in there by now
            k, v, *scales = (jax.lax.dynamic_index_in_dim(c, layer, 0, False) for c in cached)
            of = dict(alibi_slopes=context.slopes, window=context.window)
            if scales:
                of["k_scale"], of["v_scale"] = scales
            out = decode_attention(q[:, 0], k, v, context.length + 1, **of)[:, None]
        if self.sub_norm is not None:
            out = _norm_heads(self.sub_norm, out)
        out = self.o(constrain(out, "batch", "length", "heads", None))
        return out if cached is None else (out, cached)


def _norm_heads(norm: LayerNorm | RMSNorm, x: Array) -> Array:
    """Normalise [b, t, n, h] over h, or over n and h together where the norm is that wide."""
    if norm.scale.shape[-1] == x.shape[-1]:
        return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def rope_dims(head_dim: int, fraction: float) -> int:
    """Return how many dimensions of a head are rotated, an even number."""
    return int(head_dim * fraction) // 2 * 2
