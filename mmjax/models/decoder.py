"""The one causal decoder of mmjax. A Config tells which language model it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.nn import rope
from mmjax.nn.attention import Context, SelfAttention, rope_dims
from mmjax.nn.cache import Cache
from mmjax.nn.embed import Embed
from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import LayerNorm
from mmjax.nn.stack import scan, stack, unstack
from mmjax.parallel.context import length_shards, take_on_length
from mmjax.parallel.sharding import constrain

TRIM_LIMIT = 2**25
"""Weights of all layers up to which a copy of them costs next to nothing: 128 MiB in float32."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder; the defaults are Persimmon-8B as Fuyu-8B uses it.

    rope_fraction: the leading part of each head that is rotated. qk_norm: LayerNorm of queries and
    keys over the head's dimensions. activation: a name in ``mmjax.nn.mlp.ACTIVATIONS``.
    """

    vocab_size: int = 262_144
    d_model: int = 4096
    num_layers: int = 36
    num_heads: int = 64
    num_kv_heads: int = 64
    head_dim: int = 64
    d_mlp: int = 16_384
    activation: str = "relu2"
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_theta: float = 25_000.0
    rope_fraction: float = 0.5
    max_positions: int = 16_384
    init_std: float = 0.02

    def flops_per_token(self, length: int, *, asked: float = 1.0) -> float:
        """Return the FLOPs of a forward pass per token in a causal row of ``length`` tokens.

        asked: the share of positions whose logits are computed; see ``trims_last_layer``. Norms,
        rotations and activations are not counted: they are below one percent.
        """
        seen = (length + 1) / 2  # keys a query sees, on average
        rest = self._query_side + 2 * self.num_heads * self.head_dim * seen
        layers = self.num_layers - (1 - asked if self.trims_last_layer else 0)
        head = asked * self.d_model * self.vocab_size
        return 2.0 * (self.num_layers * self._key_side + layers * rest + head)

    @property
    def trims_last_layer(self) -> bool:
        """Whether the last layer's queries, and what follows them, run only where states are asked.

        It copies the weights of the other layers, so small models alone do it: TRIM_LIMIT.
        """
        return self.num_layers * (self._key_side + self._query_side) <= TRIM_LIMIT

    @property
    def _key_side(self) -> int:
        """Weights of a layer's k and v."""
        return 2 * self.d_model * self.head_dim * self.num_kv_heads

    @property
    def _query_side(self) -> int:
        """Weights of a layer's q, o and MLP."""
        return 2 * self.d_model * (self.head_dim * self.num_heads + self.d_mlp)


class Layer(nnx.Module):
    """One pre-norm block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: DecoderConfig, *, dtypes: DTypes, lora: LoRA | None, rngs: nnx.Rngs):
        shared = dict(dtypes=dtypes, init_std=c.init_std, lora=lora, rngs=rngs)
        heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        self.attn_norm = LayerNorm(c.d_model, eps=c.norm_eps, dtypes=dtypes)
        self.attn = SelfAttention(c.d_model, *heads, qk_norm=c.qk_norm, eps=c.norm_eps, **shared)
        self.mlp_norm = LayerNorm(c.d_model, eps=c.norm_eps, dtypes=dtypes)
        self.mlp = MLP(c.d_model, c.d_mlp, activation=c.activation, **shared)

    def __call__(
        self, x: Array, context: Context, layer: Array, cached=None, at: Array | None = None
    ):
        """Map [b, t, d] to [b, t, d]; with ``cached`` also returns the updated (k, v).

        at: int32[b, m], the positions whose outputs [b, m, d] are wanted; None for all.
        """
        out = self.attn(self.attn_norm(x), context, layer, cached, at)
        if cached is not None:
            out, cached = out
        x = x if at is None else take_on_length(x, at)
        x = checkpoint_name(constrain(x + out, "batch", "length", "embed"), "attn_sum")
        x = constrain(x + self.mlp(self.mlp_norm(x)), "batch", "length", "embed")
        return x if cached is None else (x, cached)


class Decoder(nnx.Module):
    """Embedding, stacked layers, final norm and head."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtypes: DTypes,
        rngs: nnx.Rngs,
        lora: LoRA | None = None,
        remat: str = "names",
        attention: str = "auto",
    ):
        c = self.config = config
        self.remat, self.attention, self.dtypes = remat, attention, dtypes
        shared = dict(dtypes=dtypes, init_std=c.init_std, rngs=rngs)
        self.embed = Embed(c.vocab_size, c.d_model, **shared)
        make = partial(_make_layer, c, dtypes, lora)
        self.layers = stack(make, c.num_layers, rngs)
        self.final_norm = LayerNorm(c.d_model, eps=c.norm_eps, dtypes=dtypes)
        vocab = (c.d_model,), (c.vocab_size,), ("embed", "vocab")
        self.head = Linear(*vocab, name="head", bias=False, lora=lora, **shared)

    def __call__(
        self,
        x: Array,
        positions: Array,
        *,
        k_start: Array | None = None,
        k_end: Array | None = None,
        at: Array | None = None,
        cache: Cache | None = None,
        decode: bool = False,
        layers: Sequence[Layer] | None = None,
    ) -> tuple[Array, Cache | None]:
        """Run the layers and the final norm on embedded tokens.

        x: [b, t, d]; positions: int32[b, t]; k_start, k_end: int32[b, t], see
            ``mmjax.ops.attention``.
        at: int32[b, m], the positions whose hidden states are wanted, [b, m, d]; None for all t.
            Not with a cache.
        cache: when given, keys and values are written into it: all t at 0 (a prefill; the caller
            sets ``length``), or with ``decode`` the one token of each row at its ``length``.
        layers: with ``decode``, the layers of ``unstack()`` and an unstacked cache: no scan then.
        Returns the normed hidden states [b, t, d] and the updated cache.
        """
        c = self.config
        dims = rope_dims(c.head_dim, c.rope_fraction)
        cos, sin = rope.angles(positions, dims, c.rope_theta)
        length = cache.length if decode else None
        context = Context(cos, sin, k_start, k_end, length, self.attention)
        x = constrain(x, "batch", "length", "embed")
        if cache is None:
            trim = at is not None and c.trims_last_layer and length_shards(*x.shape[1::-1]) == 1
            x = scan(
                self.layers,
                c.num_layers,
                lambda m, x, i: m(x, context, i),
                x,
                remat=self.remat,
                last=(lambda m, x, i: m(x, context, i, at=at)) if trim else None,
            )
            return self.final_norm(x if trim or at is None else take_on_length(x, at)), None

        if layers is not None:
            pairs = []
            for layer, *pair in zip(layers, cache.k, cache.v, strict=True):
                x, pair = layer(x, context, 0, tuple(pair))
                pairs.append(pair)
            k, v = zip(*pairs, strict=True)
            return self.final_norm(x), Cache(k, v, cache.length + 1)

        def step(layer, carry, i):
            return layer(carry[0], context, i, carry[1])

        x, (k, v) = scan(self.layers, c.num_layers, step, (x, (cache.k, cache.v)))
        length = cache.length + 1 if decode else cache.length
        return self.final_norm(x), Cache(k, v, length)

    def unstack(self) -> tuple[Layer, ...]:
        """Return the layers one by one, for decoding without a scan."""
        return unstack(self.layers, self.config.num_layers)

    def logits(self, hidden: Array) -> Array:
        """Return float32 logits [..., v] of hidden states [..., d]."""
        return self.head(hidden).astype(jnp.float32)

    def init_cache(self, b: int, s: int, dtype=None) -> Cache:
        """Return an empty cache for b rows of s tokens in the compute dtype, or in ``dtype``."""
        c = self.config
        dtype = dtype or self.dtypes.compute
        return Cache.empty(c.num_layers, b, s, c.num_kv_heads, c.head_dim, jax.numpy.dtype(dtype))


def _make_layer(c: DecoderConfig, dtypes: DTypes, lora: LoRA | None, rngs: nnx.Rngs) -> Layer:
    return Layer(c, dtypes=dtypes, lora=lora, rngs=rngs)
