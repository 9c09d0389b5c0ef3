"""Fuyu's processor: text and images of any size into one token stream, and tokens into text.

An image becomes rows of patch tokens, each row closed by a newline token; the patches themselves
travel beside the tokens as grey levels. Tokens and patches equal those of Hugging Face's
FuyuProcessor (transformers 5.23) for one image in front of a prompt; several images at any
position, text-only prompts, any image size and 4.35's coordinates go beyond it. numpy and Pillow
only: data workers load this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.tokenize import need_tokenizer, table_rows
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.fuyu.coordinates import CoordinateTokens
from mmjax.models.fuyu.image_plan import (
    ImagePlan,
    cut_patches,
    fitted_size,
    grid,
    plan_image,
    too_long,
)
from mmjax.models.fuyu.processor_config import ProcessorConfig
from mmjax.models.fuyu.special_tokens import check_vocabulary, special_ids
from mmjax.models.fuyu.stream import FuyuStream, prompt_segments
from mmjax.models.processor import FolderProcessor
from mmjax.models.token_stream import (
    TokenStream,
    check_answers,
    check_ends,
    check_targets,
    make_example,
    token_array,
)
from mmjax.types import BadSample, Example, ImageSource, MMJaxError, Segment

__all__ = ["FuyuProcessor", "ProcessorConfig"]


class FuyuProcessor(FolderProcessor):
    """Encode prompts and images into Examples and decode answers, with one tokenizer or none."""

    CONFIG = ProcessorConfig

    def __init__(self, config: ProcessorConfig | None = None, tokenizer: Any | None = None):
        """Take the ids of the special tokens from the tokenizer, or without one from the config.

        Raises MMJaxError when the tokenizer lacks a token that Fuyu's stream is made of.
        """
        config = config or ProcessorConfig()
        self.coordinates = None
        if tokenizer is not None:
            config = dataclasses.replace(config, **special_ids(tokenizer))
            self.coordinates = CoordinateTokens(tokenizer)
        super().__init__(config, tokenizer)
        self.specials = {
            "bos": config.bos_token_id,
            "answer": config.answer_token_id,
            "eos": config.eos_token_id,
        }

    @property
    def eos_token_id(self) -> int:
        """The id that ends an answer."""
        return self.config.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """The id that fills a row behind its samples."""
        return self.config.pad_token_id

    @property
    def image_token_id(self) -> int:
        """The id that stands where a patch is put."""
        return self.config.image_token_id

    @classmethod
    def for_words(cls, words: Sequence[str], config: Any) -> FuyuProcessor:
        """Build one with a small tokenizer of these words, for models that start from nothing."""
        options = ProcessorConfig(patch_size=config.patch_size, num_channels=config.num_channels)
        return cls(options, build_word_tokenizer(words))

    def token_ids(self) -> dict[str, int]:
        """Return the vocabulary size and special ids under their names in config.json."""
        config = self.config
        return {
            "vocab_size": table_rows(self.tokenizer),
            "image_token_id": config.image_token_id,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        }

    def check(self, config: Any) -> None:
        """Raise MMJaxError when this processor cannot belong to a model of this config."""
        check_vocabulary(self, config.vocab_size, config.image_token_id)
        if self.config.patch_size != config.patch_size:
            raise MMJaxError(
                f"the processor cuts patches of {self.config.patch_size} pixels and the model "
                f"takes {config.patch_size}; they are of different models"
            )
        for name in ("image_mean", "image_std"):
            mine, models = getattr(self.config, name), getattr(config, name)
            if not np.allclose(mine, models, rtol=0, atol=1e-6):
                raise MMJaxError(
                    f"the processor has {name} {mine}, and the model normalises with {models} on "
                    "the device, as every published Fuyu; correct preprocessor_config.json"
                )

    def check_resolution(self, longest: int) -> None:
        """Raise MMJaxError where pictures of this longest side may be shrunk again.

        Fuyu-8B's box of 1080 x 1920 pixels would do so to a square of 1440 without a word, as it
        does in OtterHD's benchmarks, and leave wide pictures of that side as they are.
        """
        height, width = self.config.max_height, self.config.max_width
        if longest > min(height or longest, width or longest):
            raise MMJaxError(
                f"resolution {longest}: the processor would shrink pictures again that are higher "
                f"or wider than its box of {height} x {width} pixels (height x width); lower the "
                "resolution, or raise max_height and max_width to it, None for no limit: those of "
                "model.processor in a run, size in preprocessor_config.json of a model folder"
            )

    def image_tokens(self, width: int, height: int) -> int:
        """Count the stream tokens of an image: its patches and one newline for each row."""
        rows, cols = grid(*fitted_size(width, height, self.config), self.config.patch_size)
        return rows * (cols + 1)

    def image_scale(self, image: ImageSource) -> float:
        """Return resized / original height, the factor ``decode`` needs for coordinates."""
        return plan_image(image, self.config).scale

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource],
        *,
        max_tokens: int | None = None,
        patches: np.ndarray | None = None,
    ) -> Example:
        """Encode segments into an Example; neighbouring text segments are tokenised as one text.

        Raises BadSample: empty_answer, end_mark, too_long (before any pixel is read),
        image_mismatch, bad_coordinates, and those of ``open_image``.
        """
        check_answers(segments, bare_end=True)
        plans = [plan_image(image, self.config) for image in images]
        for plan in plans:
            if not plan.cols:
                raise BadSample(
                    "image_mismatch",
                    f"{plan.name}: patches without a grid cannot stand in a text prompt; give the "
                    "pixels [3,h,w], or a prompt of token ids",
                )
        tokens, loss, visual = self._stream(segments, plans).arrays()
        if max_tokens is not None and len(tokens) > max_tokens:
            raise BadSample(
                "too_long", too_long(plans, len(tokens), max_tokens, self.config.patch_size)
            )
        check_targets(segments, loss)
        check_ends(segments, tokens, loss, {"eos": self.config.eos_token_id})
        rows = self._patches(plans) if patches is None else patches
        return make_example(tokens, loss, visual, rows)

    def encode_prompt(
        self, prompt: str | Sequence[int], images: Sequence[ImageSource] = ()
    ) -> Example:
        """Encode a question for generation; nothing is supervised.

        A string becomes [images] <s> text <0x04>; ``<image>`` marks in it place the images, without
        marks they stand in front. Token ids are used as they are: the patches fill the occurrences
        of ``image_token_id`` in order; without images those ids are plain tokens.

        Two differences from transformers 5.23. A string without images begins with <s> and ends
        with <0x04> too, as in training here; the peer leaves it to the tokenizer alone.
        An empty string gives <s> <0x04> as 4.35 did, without the stray underscore token that 5.23
        puts between.
        """
        if not isinstance(prompt, str):
            return self._encode_ids(prompt, images)
        return self.encode(prompt_segments(prompt, len(images)), images)

    def decode(self, tokens: Sequence[int], scale: float = 1.0) -> str:
        """Turn generated ids into the answer's text; special tokens are dropped.

        What stands before the last <0x04> is the prompt, what follows <eos> is padding. Coordinates
        are written as tags in pixels of the original image: scale is ``image_scale`` of it.
        """
        tokenizer = need_tokenizer(self.tokenizer, self.folder)
        ids = [int(token) for token in np.asarray(tokens).reshape(-1)]
        config = self.config
        if config.answer_token_id in ids:
            ids = ids[len(ids) - ids[::-1].index(config.answer_token_id) :]
        if config.eos_token_id in ids:
            ids = ids[: ids.index(config.eos_token_id)]
        dropped = {
            config.bos_token_id,
            config.pad_token_id,
            config.image_token_id,
            config.newline_token_id,
        }
        ids = [i for i in ids if i >= 0 and i not in dropped]
        text = ""
        for plain, tag in self.coordinates.split_ids(ids, scale):
            text += (tokenizer.decode(plain, skip_special_tokens=True) if plain else "") + tag
        return text

    def _encode_ids(self, prompt: Sequence[int], images: Sequence[ImageSource]) -> Example:
        """Lay the patches on the image ids of a ready token sequence."""
        tokens = token_array(prompt)
        plans = [plan_image(image, self.config) for image in images]
        places = np.flatnonzero(tokens == self.config.image_token_id) if plans else []
        total = sum(plan.num_patches for plan in plans)
        if len(places) != total:
            raise BadSample(
                "image_mismatch",
                f"the prompt holds {len(places)} image tokens (id {self.config.image_token_id}) "
                f"but the images make {total} patches; each patch needs one token",
            )
        visual = np.full(len(tokens), -1, np.int32)
        visual[places] = np.arange(total, dtype=np.int32)
        stream = TokenStream()
        stream.add(tokens, visual=visual)
        return make_example(*stream.arrays(), self._patches(plans))

    def _stream(self, segments: Sequence[Segment], plans: Sequence[ImagePlan]) -> TokenStream:
        """Turn segments into ids, targets and visual rows."""
        firsts = np.cumsum([0] + [plan.num_patches for plan in plans])
        stream = FuyuStream(self.config, self.tokenizer, self.folder, self.coordinates)
        stream.scale = plans[0].scale if plans else 1.0
        used = set()
        for segment in segments:
            if segment.kind == "text":
                stream.text(str(segment.value), segment.loss)
                continue
            if segment.kind == "special":
                if segment.value not in self.specials:
                    raise MMJaxError(
                        f"Fuyu has no special token {segment.value!r}: the template is another "
                        "family's; choose one of Fuyu's, such as 'fuyu_chat'"
                    )
                stream.add(self.specials[segment.value], segment.loss)
                continue
            index = int(segment.value)
            if not 0 <= index < len(plans):
                raise BadSample(
                    "image_mismatch", f"the prompt asks for image {index} of {len(plans)}"
                )
            used.add(index)
            stream.image(plans[index], int(firsts[index]))
        if len(used) != len(plans):
            missing = sorted(set(range(len(plans))) - used)
            raise BadSample("image_mismatch", f"images {missing} have no place in the prompt")
        return stream

    def _patches(self, plans: Sequence[ImagePlan]) -> np.ndarray:
        """Read, shrink, pad and cut the images: [p, pixels] in the order of the images."""
        config = self.config
        patches = [cut_patches(plan, config) for plan in plans]
        if any(p.dtype != np.uint8 for p in patches):
            split = (-1, config.num_channels)
            patches = [
                config.normalise(p.reshape(split)).reshape(p.shape) if p.dtype == np.uint8 else p
                for p in patches
            ]
        if not patches:
            return np.zeros((0, config.patch_dim), np.uint8)
        return patches[0] if len(patches) == 1 else np.concatenate(patches)
