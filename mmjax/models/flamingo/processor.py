"""Flamingo's processor: text with ``<image>`` marks and media into tokens, and tokens into text.

An image is one token; what it shows reaches the text through cross attention, so each row of
``patches`` is a whole medium and ``visual_index`` says which one a token may look at. Tokens equal
what the peers' tokenizer makes of the peers' prompt strings, pixels what open_clip's or
transformers' CLIP transform makes of a picture. numpy and Pillow only: data workers load this.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.limits import truncate
from mmjax.data.tokenize import (
    encode_text,
    need_tokenizer,
    opening_ids,
    table_rows,
)
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.flamingo.media import look_at, media_rows
from mmjax.models.flamingo.processor_config import ProcessorConfig
from mmjax.models.flamingo.special_tokens import ANSWER, EOC, complete_tokenizer
from mmjax.models.processor import FolderProcessor
from mmjax.models.token_stream import (
    TokenStream,
    check_answers,
    check_ends,
    check_length,
    check_targets,
    image_order,
    make_example,
    mismatch,
    token_array,
)
from mmjax.types import BadSample, Example, ImageSource, MMJaxError, Segment

__all__ = ["FlamingoProcessor", "ProcessorConfig"]


class FlamingoProcessor(FolderProcessor):
    """Encode prompts and media into Examples and decode answers, with one tokenizer or none.

    A medium is a picture (a path, bytes, a PIL image, uint8 pixels) or, with the option ``frames``,
    a list of so many. Float arrays are taken as normalised already, [h,w,3] as here or [3,h,w] as
    the peer's tensors are, a video [f,...] with its frames in front; h and w are image_size.
    """

    CONFIG = ProcessorConfig

    def __init__(self, config: ProcessorConfig | None = None, tokenizer: Any | None = None):
        """Take the ids of the special tokens from the tokenizer, or without one from the config.

        Tokens of Flamingo that the tokenizer lacks are added to it, see ``complete_tokenizer``.
        """
        config = config or ProcessorConfig()
        self.opening: list[int] = []
        if tokenizer is not None:
            config = dataclasses.replace(config, **complete_tokenizer(tokenizer, config))
            self.opening = opening_ids(tokenizer, config.bos)
        super().__init__(config, tokenizer)

    @classmethod
    def for_words(cls, words: Sequence[str], config: Any) -> FlamingoProcessor:
        """Build one with a small tokenizer of these words, for models that start from nothing."""
        options = ProcessorConfig(
            image_size=config.vision.image_size,
            image_mean=tuple(config.image_mean),
            image_std=tuple(config.image_std),
            max_media=config.perceiver.max_media,
            answer_token=True,
        )
        return cls(options, build_word_tokenizer(words))

    def token_ids(self) -> dict[str, int]:
        """Return the vocabulary size and special ids under their names in config.json."""
        config = self.config
        ids = {
            "vocab_size": table_rows(self.tokenizer),
            "media_token_id": config.media_token_id,
            "eoc_token_id": config.eoc_token_id,
            "answer_token_id": config.answer_token_id,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        }
        return {name: value for name, value in ids.items() if value is not None}

    def check(self, config: Any) -> None:
        """Raise MMJaxError when this processor cannot belong to a model of this config."""
        own = self.config
        if self.tokenizer is not None and len(self.tokenizer) > config.vocab_size:
            added = own.answer_token and config.answer_token_id is None
            fix = "use the tokenizer the model was trained with, or raise vocab_size"
            if added:
                fix = (
                    f"processor.answer_token=True adds {ANSWER}, which the model does not have: "
                    "leave that away (a run that trains its row adds it)"
                )
            raise MMJaxError(
                f"the tokenizer has {len(self.tokenizer)} tokens, those of Flamingo included, but "
                f"the model's vocab_size is {config.vocab_size}; {fix}"
            )
        if own.media_token_id not in (None, config.media_token_id):
            raise MMJaxError(
                f"the tokenizer puts {own.image_mark} at {own.media_token_id} but the model's "
                f"media_token_id is {config.media_token_id}: they are of different models; "
                "use the tokenizer the model was trained with, or correct it in config.json"
            )
        own.check_model(config.vision.image_size, config)
        most = config.perceiver.max_frames
        if most is not None and own.frames > most:
            raise MMJaxError(
                f"the processor takes media of {own.frames} frames and the model has embeddings of "
                f"{most}; set the processor's frames to {most} or fewer"
            )
        most = config.perceiver.max_media
        if most is not None and (own.max_media is None or own.max_media > most):
            raise MMJaxError(
                f"the processor's max_media is {own.max_media} and the model has embeddings of "
                f"{most} media; set the processor's max_media to {most} or fewer"
            )

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource],
        *,
        max_tokens: int | None = None,
        patches: np.ndarray | None = None,
    ) -> Example:
        """Encode segments into an Example; text and special tokens are tokenised as one string.

        Special segments: ``bos`` is what the tokenizer begins with, maybe nothing, ``eoc``,
        ``answer``, ``eos``, and ``cut``, behind which the tokenizer starts anew. Raises BadSample:
        empty_answer, end_mark, too_long (before any pixel is read), image_mismatch, frame_count,
        too_many_media, and those of ``open_image``.
        """
        check_answers(segments)
        order = image_order(segments, len(images))
        tokens, loss, _ = self._stream(segments).arrays()
        media = tokens == self.config.media_token_id
        if media.sum() != len(order):
            raise BadSample(
                "image_mismatch",
                f"the text itself holds {self.config.image_mark}: {media.sum()} marks for "
                f"{len(order)} images; take it out of the text",
            )
        check_length(len(tokens), max_tokens)
        self._check_media(len(order))
        check_targets(segments, loss)
        ends = {"eoc": self.config.eoc_token_id, "eos": self.config.eos_token_id}
        check_ends(segments, tokens, loss, ends)
        rows = media_rows([images[i] for i in order], self.config) if patches is None else patches
        return make_example(tokens, loss, self._look(media), rows)

    def drawn(self, rng: np.random.Generator) -> FlamingoProcessor:
        """Return the processor of one training sample: a random ``attend_mode`` is drawn."""
        if self.config.attend_mode != "random":
            return self
        mode = ("previous", "next")[int(rng.integers(2))]
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, attend_mode=mode)
        return other

    def _look(self, media: np.ndarray) -> np.ndarray:
        """Return what each token looks at; media: bool[t]. Only training looks ahead at random."""
        return look_at(media, "next" if self.config.attend_mode == "next" else "previous")

    def truncate(self, example: Example, max_tokens: int) -> Example:
        """Cut an example on the right, with the media whose ``<image>`` is behind the cut.

        With ``attend_mode`` "next", text that looked at one of those then looks at none. Raises
        BadSample ``too_long`` when no target is left.
        """
        cut = truncate(example, max_tokens)
        media = int((cut["tokens"] == self.config.media_token_id).sum())
        visual = cut["visual_index"]
        return cut | {
            "visual_index": np.where(visual < media, visual, np.int32(-1)),
            "patches": cut["patches"][:media],
        }

    def picture(self, row: np.ndarray) -> np.ndarray:
        """Draw one row of ``patches``, the frames of a medium side by side, as uint8[h, w, 3]."""
        side = self.config.image_size
        frames = self.config.grey(row.reshape(-1, side, side, 3))
        return np.ascontiguousarray(frames.swapaxes(0, 1).reshape(side, -1, 3))

    def encode_prompt(
        self, prompt: str | Sequence[int], images: Sequence[ImageSource] = ()
    ) -> Example:
        """Encode a question for generation; nothing is supervised.

        A string is tokenised as the peer would, with its ``<image>`` marks where the images stand;
        without marks they stand in front. Token ids are used as they are: each ``media_token_id``
        is an image, in order. Raises MMJaxError when there is not one mark for each image, and
        for more than ``max_media``.
        """
        config = self.config
        if isinstance(prompt, str):
            tokenizer = need_tokenizer(self.tokenizer, self.folder)
            if config.image_mark not in prompt:
                prompt = config.image_mark * len(images) + prompt
            ids = encode_text(tokenizer, prompt)[0]
            tokens = np.concatenate([np.int32(self.opening), ids]).astype(np.int32)
        else:
            tokens = token_array(prompt)
        media = tokens == config.media_token_id
        if media.sum() != len(images):
            raise mismatch("prompt", int(media.sum()), len(images))
        self._check_media(len(images))
        rows = media_rows(list(images), config)
        return make_example(tokens, np.zeros(len(tokens), bool), self._look(media), rows)

    def decode(self, tokens: Sequence[int] | np.ndarray, scale: float = 1.0) -> str:
        """Turn generated ids into the answer's text; special tokens are dropped.

        What stands before the last <answer> is the prompt; what follows the first <|endofchunk|> or
        <eos> is dropped. scale is for families that speak in coordinates.
        """
        tokenizer, config = need_tokenizer(self.tokenizer, self.folder), self.config
        ids = [int(token) for token in np.asarray(tokens).reshape(-1)]
        if config.answer_token_id in ids:
            ids = ids[len(ids) - ids[::-1].index(config.answer_token_id) :]
        ends = (config.eoc_token_id, config.eos_token_id)
        ids = ids[: next((i for i, token in enumerate(ids) if token in ends), None)]
        dropped = {config.media_token_id, config.pad_token_id}
        ids = [i for i in ids if 0 <= i < len(tokenizer) and i not in dropped]
        return tokenizer.decode(ids, skip_special_tokens=True)

    def _stream(self, segments: Sequence[Segment]) -> TokenStream:
        """Lay segments out as one stream."""
        stream = TokenStream(self.tokenizer, self.folder)
        marks = {"eoc": EOC, "answer": ANSWER}
        for segment in segments:
            if segment.kind == "text":
                stream.text(str(segment.value), segment.loss)
            elif segment.kind == "image":
                stream.text(self.config.image_mark)
            elif segment.value in marks:
                self._require_special(str(segment.value))
                stream.text(marks[str(segment.value)], segment.loss)
            elif segment.value in ("bos", "eos", "cut"):
                end = [self.config.eos_token_id] if segment.value == "eos" else []
                stream.add(self.opening if segment.value == "bos" else end, segment.loss)
            else:
                raise MMJaxError(
                    f"Flamingo has no special token {segment.value!r}: the template is another "
                    "family's; choose one of mmjax/data/templates_flamingo.py"
                )
        return stream

    def _check_media(self, count: int) -> None:
        most = self.config.max_media
        if most is not None and count > most:
            raise BadSample(
                "too_many_media",
                f"the sample has {count} media and the model has embeddings of {most}; set "
                f"data.max_images to {most}, or give fewer",
            )

    def _require_special(self, name: str) -> None:
        if getattr(self.config, f"{name}_token_id") is None:
            raise MMJaxError(
                f"the template asks for the token {name!r}, which the tokenizer lacks; "
                "processor.answer_token=True adds Otter's, or use another template"
            )
