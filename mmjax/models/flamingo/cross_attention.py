"""Gated cross attention from text to media (Alayrac et al. 2022), and which media a token sees."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.models.work import Work
from mmjax.nn.cross_attention import CrossAttention
from mmjax.nn.linear import DTypes, LoRA
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import LayerNorm
from mmjax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig:
    """Sizes of a gated block; the defaults are OpenFlamingo-9B's.

    d_model: width of the text. d_media: width of the media tokens. ff_mult: width of the MLP over
    d_model. num_latents: tokens of a medium. only_immediate: whether a token sees the last medium
    before it, or all media before it. gate_init: where both gates start before their tanh: 0 leaves
    a pretrained language model as it was; one that starts from nothing learns sooner from an open
    gate.
    """

    d_model: int = 4096
    d_media: int = 1024
    num_heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4
    num_latents: int = 64
    only_immediate: bool = True
    gate_init: float = 0.0
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def work(self, blocks: int, tokens: int, media: int) -> tuple[Work, Work]:
        """Return the work of so many blocks: keys and values of all media, and what text does.

        Each of the tokens is taken to see one medium, where there are any.
        """
        inner, keys = self.num_heads * self.head_dim, min(media, 1) * self.num_latents
        maps = 2 * self.d_model * (inner + self.ff_mult * self.d_model)
        shown = 4.0 * blocks * media * self.num_latents * self.d_media * inner
        return (
            Work({"cross.attn.[kv].*": shown}),
            Work({"cross.*": 2.0 * blocks * tokens * maps}, 4.0 * blocks * tokens * inner * keys),
        )


class MediaRanges(NamedTuple):
    """The media tokens each text token sees: [k_start, k_end), int32[b, t].

    uniform: bool[b, t], tokens that weigh all of them alike, whatever they ask.
    """

    k_start: Array
    k_end: Array
    uniform: Array


def media_ranges(
    visual_index: Array, segment_ids: Array, m: int, n: int, *, only_immediate: bool = True
) -> MediaRanges:
    """Return which of the m * n media tokens of its row each text token sees.

    visual_index: int32[b, t], the last medium at or before the token, -1 before the first.
    segment_ids: int32[b, t], see ``Batch``. m: media of a row; n: tokens of a medium.

    OpenFlamingo hides scores with a finite number, so a token that matches no medium weighs all
    alike. That are those whose medium was not given (visual_index >= m; processors refuse such
    text). Those before the first medium it sets to zero afterwards; without ``only_immediate`` it
    does not, and a token whose medium was not given then sees all media as any other token does.
    All media are then those of the token's own sample, which no other of its row or batch changes.
    """
    i, last = visual_index, m * n
    before, missing = i < 0, i >= m
    if only_immediate:
        start = jnp.where(before | missing, 0, i * n)
        end = jnp.where(before, 0, jnp.where(missing, last, (i + 1) * n))
        return MediaRanges(start, end, missing)
    first, behind = (jnp.minimum(x, m) * n for x in _media_of_samples(i, segment_ids))
    end = jnp.where(before | missing, behind, (i + 1) * n)
    return MediaRanges(jnp.minimum(first, end), end, before)


def _media_of_samples(visual_index: Array, segment_ids: Array) -> tuple[Array, Array]:
    """Return the media [first, behind) of each token's sample, int32[b, t]; [0, 0) for none."""

    def of_row(index: Array, ids: Array) -> tuple[Array, Array]:
        segments = len(ids) + 1  # ids count from 1, and no sample is without a token
        most = jax.ops.segment_max(index, ids, segments)
        least = jax.ops.segment_min(jnp.where(index < 0, most[ids], index), ids, segments)
        return jnp.maximum(least[ids], 0), most[ids] + 1

    return jax.vmap(of_row)(visual_index, segment_ids)


def media_places(visual_index: Array, segment_ids: Array, m: int) -> Array:
    """Return each medium's number within its own sample, int32[b, m]; arguments as above.

    Of the padding behind a row's last medium, its number within the row.
    """
    first, _ = _media_of_samples(visual_index, segment_ids)

    def of_row(index: Array, first: Array) -> Array:
        at = jnp.where(index < 0, m, index)
        return jnp.arange(m) - jnp.zeros(m, first.dtype).at[at].max(first, mode="drop")

    return jax.vmap(of_row)(visual_index, first)


def keys_of_next_token(
    k: Array, v: Array, seen: MediaRanges, n: int, *, only_immediate: bool = True
) -> tuple[Array, Array, Array]:
    """Return what ``GatedCrossAttention.decode`` reads for the tokens that follow a prompt.

    k, v: [b, m * n, heads, h]. seen: of a row's last token, [b] each: generated text makes no
    media. Returns k and v [b, heads, s, h] and int32[b], how many of the s keys a token sees. With
    ``only_immediate`` s is n: a prompt of many images costs a step no more than one of one.
    """
    b, s, heads, h = k.shape
    if s == 0:  # values of zero, whatever their weights
        nothing = jnp.zeros((b, heads, n, h), k.dtype)
        return nothing, nothing, jnp.full((b,), n, jnp.int32)
    start, end, uniform = seen
    of_row = lambda x: x[:, None, None, None]  # noqa: E731
    # What no weights can change stands for a token that asks nothing: the mean, or zero.
    key = jnp.arange(s)
    inside = (key >= start[:, None]) & (key < end[:, None])
    total = jnp.sum(
        jnp.where(inside[..., None, None], v, 0), axis=1, keepdims=True, dtype=jnp.float32
    )
    mean = (total / of_row(jnp.maximum(end - start, 1))).astype(v.dtype)
    if only_immediate:
        at = of_row(jnp.where(uniform, 0, start)) + jnp.arange(n)[:, None, None]
        k, v = (jnp.take_along_axis(x, at, axis=1) for x in (k, v))
        v = jnp.where(of_row(end == start), 0, v)
        end = jnp.full_like(end, n)
    v = jnp.where(of_row(uniform), mean, v)
    # Of equal values any number is the same, but none at all would be no number.
    return k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.where(uniform, k.shape[1], end)


class GatedCrossAttention(nnx.Module):
    """x + tanh(gate) attn(norm(x), media), then x + tanh(gate) mlp(norm(x)).

    It stands before a layer of the decoder. Its gates, ``attn_gate`` and ``ff_gate``, are [1].
    """

    def __init__(
        self,
        c: CrossAttentionConfig,
        *,
        dtypes: DTypes,
        lora: LoRA | None,
        rngs: nnx.Rngs,
        attention: str = "auto",
    ):
        shared = dict(dtypes=dtypes, init_std=c.init_std, lora=lora, rngs=rngs, prefix="cross.")
        norm = partial(LayerNorm, c.d_model, eps=c.norm_eps, dtypes=dtypes)
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = CrossAttention(
            c.d_model, c.d_media, c.num_heads, c.head_dim, implementation=attention, **shared
        )
        self.mlp = MLP(c.d_model, c.ff_mult * c.d_model, activation="gelu", bias=False, **shared)
        gate = jnp.full((1,), c.gate_init, jnp.dtype(dtypes.param))
        self.attn_gate = nnx.Param(gate, out_sharding=("norm",))
        self.ff_gate = nnx.Param(gate, out_sharding=("norm",))

    def keys_values(self, media: Array) -> tuple[Array, Array]:
        """Return keys and values [b, m * n, heads, h] of media tokens [b, m * n, d_media]."""
        return self.attn.keys_values(media)

    def __call__(
        self, x: Array, k: Array, v: Array, k_start: Array, k_end: Array, uniform: Array
    ) -> Array:
        """Map text [b, t, d] to [b, t, d]; the last three are those of ``media_ranges``."""
        seen = k_start, k_end, uniform
        out = self.attn(self.attn_norm(x), k, v, *seen, times=_open(self.attn_gate, x))
        return self._add(x, out)

    def decode(self, x: Array, k: Array, v: Array, length: Array) -> Array:
        """Map one token a row, [b, 1, d], to [b, 1, d]; the rest is of ``keys_of_next_token``."""
        gate = _open(self.attn_gate, x)
        return self._add(x, self.attn.decode(self.attn_norm(x), k, v, length, times=gate))

    def _add(self, x: Array, out: Array) -> Array:
        """Add what attention returned, gated, to the stream, then the MLP."""
        x = checkpoint_name(constrain(x + out, "batch", "length", "embed"), "attn_sum")
        out = self.mlp(self.mlp_norm(x), _open(self.ff_gate, x))
        return constrain(x + out, "batch", "length", "embed")


def _open(gate: nnx.Param, x: Array) -> Array:
    """Return how far a gate is open, [1], in the dtype of x."""
    return jnp.tanh(gate[...].astype(jnp.float32)).astype(x.dtype)
