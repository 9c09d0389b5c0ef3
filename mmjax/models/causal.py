"""What models share that are a decoder over one stream of embeddings."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.models.decoder import Decoder
from mmjax.nn.cache import Cache
from mmjax.ops import ranges
from mmjax.types import Batch


class CausalModel(nnx.Module):
    """A decoder, and the stream that ``embed`` makes of a batch for it."""

    decoder: Decoder

    def embed(self, batch: Batch) -> Array:
        """Return the embedded stream [b, t, d] of ``tokens``, int32[b, t]."""
        return self.decoder.embed(batch["tokens"])

    def __call__(self, batch: Batch, at: Array | None = None) -> Array:
        """Return hidden states [b, t, d] of a batch; see ``mmjax.types.Batch``.

        at: int32[b, m], the positions whose states [b, m, d] are wanted; None for all.
        """
        k_start, k_end = ranges.from_segments(batch["segment_ids"])
        x = self.embed(batch)
        return self.decoder(x, batch["positions"], k_start=k_start, k_end=k_end, at=at)[0]

    def logits(self, hidden: Array) -> Array:
        """Return float32 logits [..., v]."""
        return self.decoder.logits(hidden)

    def prefill(
        self, batch: Batch, lengths: Array, cache: Cache, layers=None
    ) -> tuple[Array, Cache]:
        """Run right-padded prompts and fill the cache.

        lengths: int32[b]. layers: as in ``decode``. Returns the hidden state [b, d] of each
        prompt's last token, and the cache with its lengths set. Causality alone hides the padding,
        which stands at the end.
        """
        at = (lengths - 1)[:, None]
        hidden, cache = self.decoder(
            self.embed(batch), batch["positions"], at=at, cache=cache, layers=layers
        )
        return hidden[:, 0], dataclasses.replace(cache, length=lengths.astype(jnp.int32))

    def decode(self, tokens: Array, cache: Cache, layers=None) -> tuple[Array, Cache]:
        """Run one text token per row, int32[b], at the end of the cache; returns [b, d].

        layers: those of ``unstack()``, beside an unstacked cache; None scans the stacked ones.
        """
        x = self.decoder.embed(tokens[:, None])
        hidden, cache = self.decoder(
            x, cache.length[:, None], cache=cache, decode=True, layers=layers
        )
        return hidden[:, 0], cache

    @property
    def to_logits(self) -> nnx.Module:
        """What makes logits."""
        return self.decoder.to_logits

    def unstack(self):
        """Return the decoder's layers one by one; see ``Decoder.unstack``."""
        return self.decoder.unstack()

    def init_cache(self, b: int, s: int, dtype=None) -> Cache:
        """Return an empty cache for b rows of s tokens."""
        return self.decoder.init_cache(b, s, dtype)
