"""The one causal decoder of mmjax. A Config tells which language model it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.models.work import Work
from mmjax.nn import rope
from mmjax.nn.attention import Context, rope_dims
from mmjax.nn.cache import Cache
from mmjax.nn.dropout import drop
from mmjax.nn.embed import Embed, PositionEmbed
from mmjax.nn.layer import Layer, LayerConfig
from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.norm import make_norm
from mmjax.nn.stack import Between, scan, stack, unstack
from mmjax.ops import ranges
from mmjax.parallel.context import length_shards, take_on_length
from mmjax.parallel.sharding import constrain

TRIM_LIMIT = 2**25
"""Weights of all layers up to which a copy of them costs next to nothing: 128 MiB in float32."""

TRIM_SHARE = 0.5
"""The share of a row up to which it pays to run the last layer on the states asked for alone."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig(LayerConfig):
    """Sizes and switches of a decoder; the defaults are Persimmon-8B as Fuyu-8B uses it.

    position: how tokens learn where they stand: ``rope`` (rope_fraction is the leading part of
    each head that is rotated, rope_scaling changes its frequencies), ``alibi`` (slopes
    2 ** -(alibi_max * i / heads)), or ``learned``, a table of max_positions rows after
    position_offset unused ones (OPT).
    window: how many keys a token sees, its own among them (Phi-3); None for all.
    tied: the head is the embedding table. head_bias: of the head.
    embed_scale: multiplies the embedded stream, images in it too (Gemma, MiniCPM).
    embedding_dropout: the share of that stream that is dropped in training (Phi, GPT-NeoX).
    logit_scale: multiplies the hidden states that the head is given (MiniCPM).
    """

    vocab_size: int = 262_144
    num_layers: int = 36
    position: Literal["rope", "alibi", "learned"] = "rope"
    rope_theta: float = 25_000.0
    rope_fraction: float = 0.5
    rope_scaling: rope.Llama3Scaling | None = None
    alibi_max: float = 8.0
    max_positions: int = 16_384
    position_offset: int = 0
    window: int | None = None
    tied: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    embedding_dropout: float = dataclasses.field(default=0.0, compare=False)

    @property
    def longest(self) -> int | None:
        """Most tokens of a row; None where positions are no rows of a table."""
        return self.max_positions if self.position == "learned" else None

    def work(self, tokens: int, *, asked: float = 1.0) -> tuple[Work, Work, Work]:
        """Return the work of embedding, layers and head in a causal row of so many tokens.

        asked: the share of positions whose logits are computed; see ``trims_last_layer``. Norms,
        rotations and activations are not counted: they are below one percent.
        """
        most = min(tokens, self.window or tokens)
        seen = most * (tokens - (most - 1) / 2)  # keys that all queries see
        layers = self.num_layers - (1 - asked if self.trims_last_layer(asked) else 0)
        weights = self.num_layers * self.key_side_weights + layers * self.query_side_weights
        head = "decoder.embed.*" if self.tied else "decoder.head.*"
        logits = asked * tokens * self.d_model * self.vocab_size
        return (
            Work({"decoder.embed.*": 0.0, "decoder.position_embed.*": 0.0}),
            Work(
                {"decoder.layers.*": 2.0 * tokens * weights},
                4.0 * layers * self.num_heads * self.head_dim * seen,
            ),
            Work({"decoder.final_norm.*": 0.0, head: 2.0 * logits}),
        )

    def trims_last_layer(self, asked: float) -> bool:
        """Tell whether the last layer's queries, and what follows them, run on states asked alone.

        asked: their share of a row. It copies the weights of the other layers, so small models
        alone do it (TRIM_LIMIT), and where it leaves much out (TRIM_SHARE).
        """
        weights = self.num_layers * (self.key_side_weights + self.query_side_weights)
        return asked <= TRIM_SHARE and weights <= TRIM_LIMIT

    @property
    def alibi_slopes(self) -> tuple[float, ...]:
        """The slope of each head (Press et al. 2022).

        Where the heads are no power of two, every second slope of the next one comes first, then
        those between, as in MPT's code.
        """
        power = 2 ** math.ceil(math.log2(self.num_heads))
        slopes = [2.0 ** (-self.alibi_max * (i + 1) / power) for i in range(power)]
        if power != self.num_heads:
            slopes = [*slopes[1::2], *slopes[::2]][: self.num_heads]
        return tuple(slopes)


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
        scan_unroll: int = 1,
        attention: str = "auto",
    ):
        c = self.config = config
        self.remat, self.scan_unroll = remat, scan_unroll
        self.attention, self.dtypes = attention, dtypes
        self.dropout = c.embedding_dropout
        shared = dict(dtypes=dtypes, init_std=c.init_std, rngs=rngs)
        self.embed = Embed(c.vocab_size, c.d_model, **shared)
        make = partial(_make_layer, c, dtypes, lora)
        self.layers = stack(make, c.num_layers, rngs)
        self.final_norm = make_norm(c, dtypes=dtypes)
        rows = c.max_positions + c.position_offset
        learned = c.position == "learned"
        self.position_embed = PositionEmbed(rows, c.d_model, **shared) if learned else None
        vocab = (c.d_model,), (c.vocab_size,), ("embed", "vocab")
        of = dict(name="head", bias=c.head_bias, lora=lora)
        self.head = None if c.tied else Linear(*vocab, **of, **shared)

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
        between: Between | None = None,
    ) -> tuple[Array, Cache | None]:
        """Run the layers and the final norm on embedded tokens.

        x: [b, t, d]; positions: int32[b, t]; k_start, k_end: int32[b, t], see
            ``mmjax.ops.attention``.
        at: int32[b, m], the positions whose hidden states are wanted, [b, m, d]; None for all t.
        cache: when given, keys and values are written into it: all t at 0 (a prefill; the caller
            sets ``length``), or with ``decode`` the one token of each row at its ``length``.
        layers: those of ``unstack()``, with an unstacked cache: no scan then.
        between: blocks among the layers, as a tuple where ``layers`` are given.
        Returns the normed hidden states [b, t, d] and the updated cache.
        """
        c = self.config
        x = x if c.embed_scale == 1.0 else x * c.embed_scale
        cos = sin = slopes = None
        if c.position == "rope":
            dims = rope_dims(c.head_dim, c.rope_fraction)
            cos, sin = rope.angles(positions, dims, c.rope_theta, c.rope_scaling)
        elif c.position == "alibi":
            slopes = jnp.asarray(c.alibi_slopes, jnp.float32)
        else:
            x = x + self.position_embed(positions + c.position_offset)
        x = drop(x, self.dropout, "embed")
        length = cache.length if decode else None
        if c.window is not None and not decode:
            k_start = ranges.in_window(k_start, *x.shape[:2], c.window)
        run = dict(window=c.window, implementation=self.attention)
        context = Context(cos, sin, k_start, k_end, length, slopes, **run)
        x = constrain(x, "batch", "length", "embed")
        trim = at is not None and length_shards(*x.shape[1::-1]) == 1
        if cache is None:
            trim = trim and c.trims_last_layer(at.shape[1] / x.shape[1])
            x = scan(
                self.layers,
                c.num_layers,
                lambda m, x, i: m(x, context, i),
                x,
                remat=self.remat,
                unroll=self.scan_unroll,
                last=(lambda m, x, i: m(x, context, i, at=at)) if trim else None,
                between=between,
            )
            return self.final_norm(x if trim or at is None else take_on_length(x, at)), None

        length = cache.length + 1 if decode else cache.length
        if layers is not None:
            buffers = []
            for i, (layer, *own) in enumerate(zip(layers, *cache.buffers, strict=True)):
                x = x if between is None else between.before(i, x)
                asked = at if trim and i == c.num_layers - 1 else None
                x, own = layer(x, context, 0, tuple(own), asked)
                buffers.append(own)
            x = x if trim or at is None else take_on_length(x, at)
            return self.final_norm(x), Cache.of(tuple(zip(*buffers, strict=True)), length)

        def step(layer, carry, i):
            return layer(carry[0], context, i, carry[1])

        if between is not None:
            run = between.step
            between = dataclasses.replace(
                between, step=lambda block, carry, i: (run(block, carry[0], i), carry[1])
            )
        x, buffers = scan(self.layers, c.num_layers, step, (x, cache.buffers), between=between)
        x = x if at is None else take_on_length(x, at)
        return self.final_norm(x), Cache.of(buffers, length)

    @property
    def to_logits(self) -> nnx.Module:
        """What makes logits: the head, or the table it is tied to."""
        return self.embed if self.head is None else self.head

    def unstack(self) -> tuple[Layer, ...]:
        """Return the layers one by one, to run them without a scan."""
        return unstack(self.layers, self.config.num_layers)

    def logits(self, hidden: Array) -> Array:
        """Return float32 logits [..., v] of hidden states [..., d]."""
        head, scale = self.embed.attend if self.head is None else self.head, self.config.logit_scale
        if scale != 1.0:  # in float32: bfloat16 would round the factor itself
            hidden = (hidden.astype(jnp.float32) * scale).astype(hidden.dtype)
        return head(hidden).astype(jnp.float32)

    def init_cache(self, b: int, s: int, dtype=None) -> Cache:
        """Return an empty cache for b rows of s tokens in the compute dtype, or in ``dtype``.

        dtype: see ``mmjax.nn.cache.DTYPES``.
        """
        c = self.config
        dtype = dtype or self.dtypes.compute
        return Cache.empty(c.num_layers, b, s, c.num_kv_heads, c.head_dim, dtype)


def _make_layer(c: DecoderConfig, dtypes: DTypes, lora: LoRA | None, rngs: nnx.Rngs) -> Layer:
    return Layer(c, dtypes=dtypes, lora=lora, rngs=rngs)
