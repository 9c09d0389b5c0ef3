"""Flamingo: a frozen language model that looks at media through gated cross-attention.

Alayrac et al. 2022, as OpenFlamingo (Awadalla et al. 2023), Otter and Clever Flamingo build it.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.models.decoder import Decoder
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.flamingo.cross_attention import (
    GatedCrossAttention,
    MediaRanges,
    keys_of_next_token,
    media_places,
    media_ranges,
)
from mmjax.models.flamingo.perceiver import Perceiver
from mmjax.models.vit import ViT, normalized
from mmjax.nn.cache import Cache
from mmjax.nn.linear import DTypes, LoRA
from mmjax.nn.stack import Between, stack, unstack
from mmjax.ops import ranges
from mmjax.types import Batch, MMJaxError

__all__ = ["Flamingo", "FlamingoCache", "FlamingoConfig"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlamingoCache:
    """The decoder's cache, and what generated tokens see of the media: it is the same for all.

    text: of the decoder. k, v: [g, b, heads, s, h], of every gated block, or tuples of g; they stay
    in the compute dtype, whatever that of ``text`` is. seen: int32[b], how many of the s media keys
    a row's tokens see.
    """

    text: Cache
    k: Array | tuple[Array, ...] | None = None
    v: Array | tuple[Array, ...] | None = None
    seen: Array | None = None

    @property
    def length(self) -> Array:
        """How many tokens of each row are filled, int32[b]."""
        return self.text.length

    def unstack(self) -> FlamingoCache:
        """Return the cache with a buffer for each layer, and once it is filled each gated block."""
        k, v = (None if x is None else tuple(x) for x in (self.k, self.v))
        return dataclasses.replace(self, text=self.text.unstack(), k=k, v=v)

    def take(self, rows: Array) -> FlamingoCache:
        """Return the cache of the rows int32[b'], which may repeat."""
        axis = 0 if isinstance(self.k, tuple) else 1
        k, v = jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), (self.k, self.v))
        return FlamingoCache(self.text.take(rows), k, v, self.seen[rows])


class Flamingo(nnx.Module):
    """A vision tower, a Perceiver resampler, and gated blocks before layers of a decoder."""

    def __init__(
        self,
        config: FlamingoConfig,
        *,
        rngs: nnx.Rngs,
        dtypes: DTypes = DTypes(),  # noqa: B008
        lora: LoRA | None = None,
        remat: str = "names",
        scan_unroll: int = 1,
        attention: str = "auto",
    ):
        c = self.config = config
        run = dict(remat=remat, scan_unroll=scan_unroll, attention=attention)
        shared = dict(dtypes=dtypes, lora=lora, rngs=rngs, **run)
        self.vision = ViT(c.vision, **shared)
        self.perceiver = Perceiver(c.perceiver, **shared)
        self.cross = stack(partial(_make_block, c, dtypes, lora, attention), c.num_cross, rngs)
        self.decoder = Decoder(c.decoder, **shared)

    def media(self, batch: Batch) -> Array:
        """Return the media tokens [b, m * n, d] of a batch.

        patches: [b, m, f * H * W * 3], a row for each medium of f frames: uint8 grey levels, or
        floats that are already normalised; no such array, where m is 0.
        """
        rows = batch.get("patches")
        if rows is None or rows.shape[1] == 0:
            shape = len(batch["tokens"]), 0, self.config.cross.d_media
            return jnp.zeros(shape, self.decoder.dtypes.compute)
        c, (b, m, width) = self.config.vision, rows.shape
        frames, rest = divmod(width, self.config.patch_dim)
        if rest or not frames:
            raise MMJaxError(
                f"a medium of {width} numbers is no frames of {c.image_size} x {c.image_size} x "
                f"{c.num_channels}; the processor's image_size is not the model's"
            )
        images = rows.reshape(-1, c.image_size, c.image_size, c.num_channels)
        mean, std = self.config.image_mean, self.config.image_std
        tokens = self.vision(normalized(images, mean, std))
        tokens = tokens.reshape(b, m, frames, *tokens.shape[1:])
        places = None
        if self.perceiver.media_embed is not None:
            places = media_places(batch["visual_index"], batch["segment_ids"], m)
        latents = self.perceiver(tokens, places)
        return latents.reshape(b, -1, latents.shape[-1])

    def __call__(self, batch: Batch, at: Array | None = None) -> Array:
        """Return hidden states [b, t, d] of a batch; see ``mmjax.types.Batch``.

        at: int32[b, m], the positions whose states [b, m, d] are wanted; None for all.
        """
        media = self.media(batch)

        def look(block: GatedCrossAttention, x: Array, _) -> Array:
            return block(x, *block.keys_values(media), *seen)

        seen = self._ranges(batch, media)
        k_start, k_end = ranges.from_segments(batch["segment_ids"])
        return self.decoder(
            self.decoder.embed(batch["tokens"]),
            batch["positions"],
            k_start=k_start,
            k_end=k_end,
            at=at,
            between=self._between(look),
        )[0]

    def logits(self, hidden: Array) -> Array:
        """Return float32 logits [..., v]."""
        return self.decoder.logits(hidden)

    def prefill(
        self, batch: Batch, lengths: Array, cache: FlamingoCache, layers=None
    ) -> tuple[Array, FlamingoCache]:
        """Run right-padded prompts; media are encoded once, their keys and values kept.

        lengths: int32[b]. Returns the last tokens' hidden states [b, d] and the cache.
        """
        media, c = self.media(batch), self.config
        decoder_layers, blocks = (None, None) if layers is None else layers
        if blocks is None:
            graphdef, state = nnx.split(self.cross)
            k, v = jax.vmap(lambda one: nnx.merge(graphdef, one).keys_values(media))(state)
        else:
            k, v = zip(*(block.keys_values(media) for block in blocks), strict=True)
        seen, at = self._ranges(batch, media), (lengths - 1)[:, None]

        def look(block: GatedCrossAttention, x: Array, i: Array) -> Array:
            return block(x, k[i], v[i], *seen)

        hidden, text = self.decoder(
            self.decoder.embed(batch["tokens"]),
            batch["positions"],
            at=at,
            cache=cache.text,
            layers=decoder_layers,
            between=self._between(look, blocks),
        )
        text = dataclasses.replace(text, length=lengths.astype(jnp.int32))
        keep = partial(
            keys_of_next_token,
            seen=jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=1)[:, 0], seen),
            n=c.cross.num_latents,
            only_immediate=c.cross.only_immediate,
        )
        if blocks is None:
            k, v, kept = jax.vmap(keep)(k, v)
        else:
            k, v, kept = zip(*map(keep, k, v), strict=True)
        return hidden[:, 0], FlamingoCache(text, k, v, kept[0])

    def decode(
        self, tokens: Array, cache: FlamingoCache, layers=None
    ) -> tuple[Array, FlamingoCache]:
        """Run one text token per row, int32[b]: it sees the media that its prompt's last token saw.

        layers: those of ``unstack()``, beside an unstacked cache; None scans the stacked ones.
        """
        decoder_layers, blocks = (None, None) if layers is None else layers

        def look(block: GatedCrossAttention, x: Array, i) -> Array:
            return block.decode(x, cache.k[i], cache.v[i], cache.seen)

        hidden, text = self.decoder(
            self.decoder.embed(tokens[:, None]),
            cache.length[:, None],
            cache=cache.text,
            decode=True,
            layers=decoder_layers,
            between=self._between(look, blocks),
        )
        return hidden[:, 0], dataclasses.replace(cache, text=text)

    @property
    def to_logits(self) -> nnx.Module:
        """What makes logits."""
        return self.decoder.to_logits

    def unstack(self):
        """Return the decoder's layers and the gated blocks, one by one."""
        return self.decoder.unstack(), unstack(self.cross, self.config.num_cross)

    def init_cache(self, b: int, s: int, dtype=None) -> FlamingoCache:
        """Return an empty cache for b rows of s tokens; ``prefill`` fills in the media.

        dtype: of the text's keys and values alone.
        """
        return FlamingoCache(self.decoder.init_cache(b, s, dtype))

    def _between(self, look, blocks=None) -> Between:
        return Between(self.cross if blocks is None else blocks, self.config.cross_every, look)

    def _ranges(self, batch: Batch, media: Array) -> MediaRanges:
        """Return which media keys each token sees."""
        n, only = self.config.cross.num_latents, self.config.cross.only_immediate
        which = batch["visual_index"], batch["segment_ids"], media.shape[1] // n
        return media_ranges(*which, n, only_immediate=only)


def _make_block(
    c: FlamingoConfig, dtypes: DTypes, lora: LoRA | None, attention: str, rngs: nnx.Rngs
) -> GatedCrossAttention:
    return GatedCrossAttention(c.cross, dtypes=dtypes, lora=lora, attention=attention, rngs=rngs)
