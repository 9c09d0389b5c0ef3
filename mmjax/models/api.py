"""The contract of a model family: what the rest of mmjax may expect, and nothing else.

A family is a folder ``models/<name>/`` with ``model.py``, ``processor.py`` and ``weights.py``, and
one line in ``models/registry.py``. ``train``, ``generate``, ``evals`` and ``data`` know families
through this contract alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jax import Array

from mmjax.models.decoder import DecoderConfig
from mmjax.models.work import Work
from mmjax.nn.cache import Cache
from mmjax.types import Batch, Example, ImageSource, Segment


class Config(Protocol):
    """A frozen dataclass with everything that shapes the model."""

    decoder: DecoderConfig  # of its language model
    end_token_ids: tuple[int, ...]  # any of them ends an answer; none: the tokenizer's end does
    vocab_size: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Read any published variant of the family's config.json."""

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json that PyTorch's side reads."""

    def work(
        self, tokens: int, *, asked: float = 1.0, visual: int = 0, width: int = 0
    ) -> tuple[Work, ...]:
        """Return what the forward pass of a row multiplies, in order from the input to the loss.

        tokens: of the row. asked: the share of them whose logits are computed. visual: rows of its
        visual stream, of ``width`` numbers each. Every parameter is in a pattern of some ``Work``.
        """


class Model(Protocol):
    """An NNX module, built as ``Model(config, rngs=, dtypes=, lora=, **run)``.

    run: ``remat``, ``scan_unroll`` and ``attention``, see ``mmjax.train.settings.ModelSettings``.
    """

    config: Config
    to_logits: Any  # the module that makes logits: the head, or a tied embedding

    def __call__(self, batch: Batch, at: Array | None = None) -> Array:
        """Return hidden states [b, t, d], or [b, m, d] at the positions ``at``, int32[b, m]."""

    def logits(self, hidden: Array) -> Array:
        """Return float32 logits [..., v] of hidden states [..., d]."""

    def init_cache(self, b: int, s: int, dtype: Any = None) -> Cache:
        """Return an empty cache: a pytree with the ``take``, ``unstack`` and ``length`` of Cache.

        dtype: of the keys and values of text, see ``mmjax.nn.cache.DTYPES``; None for the compute
        dtype.
        What else it holds for each row must follow ``take``, which beam search calls.
        """

    def unstack(self) -> tuple[Any, ...]:
        """Return the layers one by one, for ``prefill`` and ``decode`` without a scan."""

    def prefill(
        self, batch: Batch, lengths: Array, cache: Cache, layers: tuple[Any, ...] | None = None
    ) -> tuple[Array, Cache]:
        """Run right-padded prompts of int32[b] tokens.

        Returns the hidden state [b, d] of each prompt's last token, and the filled cache.
        """

    def decode(
        self, tokens: Array, cache: Cache, layers: tuple[Any, ...] | None = None
    ) -> tuple[Array, Cache]:
        """Run one token a row, int32[b]; returns hidden states [b, d] and the grown cache."""


class Processor(Protocol):
    """Text and images to Examples and back; numpy only, so that data workers can use it.

    Five methods are optional. ``picture(row) -> uint8[h, w, 3]`` draws a row of ``patches``, where
    each is a whole image and ``visual_index`` says which one a token looks at. ``truncate(example,
    max_tokens)`` cuts an example where ``mmjax.data.limits.truncate`` does not know enough.
    ``check_template(template)`` raises MMJaxError for a template of other tokens, before any record
    is read. ``check_resolution(longest)`` raises it for a longest side of pictures that is never
    shown. ``drawn(rng)`` returns the processor of one training sample, where a setting is drawn
    for each.
    """

    tokenizer: Any
    patch_dim: int  # numbers in one row of the visual stream

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> Processor:
        """Read a model folder; tokenizer files are optional until a string must be encoded.

        options: settings that count before those of the folder.
        """

    @classmethod
    def for_words(cls, words: Sequence[str], config: Config) -> Processor:
        """Build one with a small tokenizer of these words, for models that start from nothing."""

    def with_options(self, **changes: Any) -> Processor:
        """Return a processor with other settings."""

    def check(self, config: Config) -> None:
        """Raise MMJaxError when this processor cannot belong to a model of this config."""

    def token_ids(self) -> dict[str, int]:
        """Return the vocabulary size and special ids under their names in config.json."""

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource],
        *,
        max_tokens: int | None = None,
        patches: np.ndarray | None = None,
    ) -> Example:
        """Encode segments; raises BadSample for what cannot be used.

        patches: of an Example of the same images, which are then not read again.
        """

    def encode_prompt(
        self, prompt: str | Sequence[int], images: Sequence[ImageSource] = ()
    ) -> Example:
        """Encode a question for generation."""

    def decode(self, tokens: Sequence[int] | np.ndarray, scale: float = 1.0) -> str:
        """Turn generated ids into text."""

    def save_pretrained(self, folder: Any) -> None:
        """Write the files that ``from_pretrained`` and PyTorch's side read."""
