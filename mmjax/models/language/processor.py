"""The processor of a language model alone: text, and nothing but text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.tokenize import load_tokenizer, table_rows
from mmjax.data.tokenizer_files import save_tokenizer
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.token_stream import (
    TokenStream,
    check_ends,
    check_length,
    make_example,
    token_array,
)
from mmjax.types import BadSample, Example, ImageSource, MMJaxError, Segment


class LanguageProcessor:
    """Encode text into Examples and decode answers, with a tokenizer or none."""

    patch_dim = 1  # of no row: there are no images

    def __init__(self, tokenizer: Any | None = None):
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> LanguageProcessor:
        """Read a model folder; tokenizer files are optional until a string must be encoded."""
        return cls(load_tokenizer(folder)).with_options(**options)

    @classmethod
    def for_words(cls, words: Sequence[str], config: Any) -> LanguageProcessor:
        """Build one with a small tokenizer of these words, for models that start from nothing."""
        return cls(build_word_tokenizer(words))

    def with_options(self, **changes: Any) -> LanguageProcessor:
        """Return a processor with other settings; there are none."""
        if changes:
            raise MMJaxError(f"a language model's processor has no setting {', '.join(changes)}")
        return self

    def check(self, config: Any) -> None:
        """Raise MMJaxError when the tokenizer has ids that the model lacks."""
        if self.tokenizer is not None and len(self.tokenizer) > config.vocab_size:
            raise MMJaxError(
                f"the tokenizer knows {len(self.tokenizer)} tokens and the model "
                f"{config.vocab_size}; they are of different models"
            )

    def token_ids(self) -> dict[str, int]:
        """Return the vocabulary size and special ids under their names in config.json."""
        tokenizer = self._needed()
        ids = {
            "vocab_size": table_rows(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return {key: value for key, value in ids.items() if value is not None}

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource],
        *,
        max_tokens: int | None = None,
        patches: np.ndarray | None = None,
    ) -> Example:
        """Encode text segments; raises BadSample: image_mismatch, too_long, end_mark.

        Text runs between special tokens are tokenised whole; ``answer`` and ``cut`` marks stand for
        nothing, as do ``patches``. Raises MMJaxError for a special token of another family's
        template, and for an end that the tokenizer lacks.
        """
        if images or any(s.kind == "image" for s in segments):
            raise BadSample("image_mismatch", f"{len(images)} image(s) for a model of text alone")
        tokenizer = self._needed()
        marks = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
        marks |= {"answer": None, "cut": None}
        stream = TokenStream(tokenizer)
        for segment in segments:
            if segment.kind == "text":
                stream.text(str(segment.value), segment.loss)
                continue
            if segment.value not in marks:  # left out, it would be an answer without an end
                raise MMJaxError(
                    f"a language model has no special token {segment.value!r}: the template is "
                    "another family's; choose one that ends answers with 'eos', such as 'plain'"
                )
            token = marks[str(segment.value)]
            if token is None and segment.value == "eos":
                raise MMJaxError(
                    "the template ends answers with the tokenizer's eos_token, and it has none; "
                    "name one in tokenizer_config.json"
                )
            stream.add([] if token is None else [token], segment.loss)
        tokens, loss, _ = stream.arrays()
        check_length(len(tokens), max_tokens)
        check_ends(segments, tokens, loss, {"eos": marks["eos"]})
        return _example(tokens, loss)

    def encode_prompt(
        self, prompt: str | Sequence[int], images: Sequence[ImageSource] = ()
    ) -> Example:
        """Encode a prompt as the tokenizer does by itself, with the marks it puts in front."""
        if images:
            raise MMJaxError(f"the prompt comes with {len(images)} image(s); this model reads text")
        if isinstance(prompt, str):
            prompt = self._needed()(prompt, verbose=False)["input_ids"]
        tokens = token_array(prompt)
        return _example(tokens, np.zeros(len(tokens), bool))

    def decode(self, tokens: Sequence[int] | np.ndarray, scale: float = 1.0) -> str:
        """Turn generated ids into text."""
        return self._needed().decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer's files."""
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    def _needed(self) -> Any:
        if self.tokenizer is None:
            raise MMJaxError(
                "this model folder holds no tokenizer (tokenizer.json or tokenizer.model); copy "
                "it there, or give token ids instead of a string"
            )
        return self.tokenizer


def _example(tokens: np.ndarray, loss_mask: np.ndarray) -> Example:
    visual = np.full(len(tokens), -1, np.int32)
    return make_example(tokens, loss_mask, visual, np.zeros((0, 1), np.uint8))
