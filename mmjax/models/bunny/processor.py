"""Bunny's processor: text with ``<image>`` marks and pictures into tokens, and tokens into text.

An image is a run of tokens, each of which points at the picture's row of ``patches``: the model
puts the projected features there. Text around images is tokenised piece by piece, so tokens equal
those of tokenizer_image_token (bunny/util/mm_utils.py); pixels equal those of transformers' SigLIP
and CLIP image processors. numpy and Pillow only: data workers load this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data import limits
from mmjax.data.templates_bunny import ENDS
from mmjax.data.tokenize import (
    need_tokenizer,
    opening_ids,
    table_rows,
)
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.data.turns import IMAGE_MARK, Template
from mmjax.models.bunny.images import image_rows
from mmjax.models.bunny.processor_config import ProcessorConfig
from mmjax.models.processor import FolderProcessor
from mmjax.models.token_stream import (
    TokenStream,
    check_answers,
    check_length,
    check_targets,
    image_order,
    make_example,
    mismatch,
    token_array,
)
from mmjax.types import (
    BadSample,
    Example,
    ImageSource,
    Message,
    MMJaxError,
    Record,
    Segment,
)

__all__ = ["BunnyProcessor", "ProcessorConfig"]

IMAGE_ID = -200
"""The peer's id of an image, in prompts of token ids."""

_AT_IMAGE = 0  # the id that stands where an image does: any that the model knows


class BunnyProcessor(FolderProcessor):
    """Encode prompts and images into Examples and decode answers, with one tokenizer or none.

    An image is a path, bytes, a PIL image or uint8 pixels; float arrays are taken as normalised
    already, [h,w,3] as here or [3,h,w] as the peer's tensors are; h and w are image_size.
    """

    CONFIG = ProcessorConfig
    IN_CONFIG = ("image_aspect_ratio",)

    def __init__(self, config: ProcessorConfig | None = None, tokenizer: Any | None = None):
        """Take the end token from the config or, where that names none, from the tokenizer.

        Raises MMJaxError for an ``end_token`` that the tokenizer does not know as one token.
        """
        config = config or ProcessorConfig()
        self.opening: list[int] = []
        self._ends: dict[str, int] = {}  # of the templates, those the tokenizer knows
        if tokenizer is not None:
            known = tokenizer.get_added_vocab()  # others are not cut out of a text as a whole
            self._ends = {text: known[text] for text in ENDS.values() if text in known}
            config = dataclasses.replace(config, eos_token_id=_end_id(tokenizer, config))
            self.opening = opening_ids(tokenizer, config.bos)
        super().__init__(config, tokenizer)

    @classmethod
    def for_words(cls, words: Sequence[str], config: Any) -> BunnyProcessor:
        """Build one with a small tokenizer of these words, for models that start from nothing.

        It ends answers with <|endoftext|>, for the templates ``bunny_chat`` and ``bunny_prompt``.
        """
        tokenizer = build_word_tokenizer(words)
        tokenizer.add_special_tokens({"eos_token": ENDS["bunny"]})
        options = ProcessorConfig(
            image_size=config.image_size,
            fit="crop_down" if config.vision.class_token else "squash",  # CLIP's way or SigLIP's
            image_mean=tuple(config.image_mean),
            image_std=tuple(config.image_std),
            image_aspect_ratio=config.image_aspect_ratio,
            image_tokens=config.image_tokens,
            model_max_length=config.max_length,
        )
        return cls(options, tokenizer)

    def token_ids(self) -> dict[str, int]:
        """Return the vocabulary size and special ids under their names in config.json."""
        tokenizer = need_tokenizer(self.tokenizer, self.folder)
        pad = tokenizer.pad_token_id
        ids = {
            "vocab_size": table_rows(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": self.config.eos_token_id,
            "pad_token_id": self.config.eos_token_id if pad is None else pad,
        }
        return {name: value for name, value in ids.items() if value is not None}

    def check(self, config: Any) -> None:
        """Raise MMJaxError when this processor cannot belong to a model of this config."""
        own = self.config
        if self.tokenizer is not None and len(self.tokenizer) > config.vocab_size:
            raise MMJaxError(
                f"the tokenizer has {len(self.tokenizer)} tokens but the model's vocab_size is "
                f"{config.vocab_size}: they are of different models; use the tokenizer the "
                "model was trained with"
            )
        if own.eos_token_id is not None and own.eos_token_id not in config.end_token_ids:
            models = ", ".join(map(str, config.end_token_ids))
            raise MMJaxError(
                f"the processor ends an answer with {self._name(own.eos_token_id)} and the model's "
                f"eos_token_id is {models}; correct eos_token_id in config.json, or name the "
                "model's token in the processor's end_token"
            )
        own.check_model(config.image_size, config)
        for name in ("image_tokens", "image_aspect_ratio"):
            if getattr(own, name) != getattr(config, name):
                raise MMJaxError(
                    f"the processor's {name} is {getattr(own, name)!r} and the model's is "
                    f"{getattr(config, name)!r}; correct preprocessor_config.json or config.json, "
                    f"or of a run model.processor.{name} and model.config.{name}"
                )

    def check_template(self, template: Template) -> None:
        """Raise MMJaxError where a template ends answers with another token than the model.

        Of a prompt, earlier answers.
        """
        if self.tokenizer is None:
            return
        turn = Message("user", "a"), Message("assistant", "b")
        try:
            self._stream(template(Record(turn * 2)))
        except BadSample:
            return  # it asks for an image, as that of pretraining does, which has no end
        except MMJaxError as error:
            name = getattr(template, "__name__", repr(template))
            raise MMJaxError(f"template {name!r}: {error}") from error

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource],
        *,
        max_tokens: int | None = None,
        patches: np.ndarray | None = None,
    ) -> Example:
        """Encode segments into an Example; text between images is tokenised as one string.

        Special segments: ``bos`` is what the tokenizer begins with, maybe nothing; ``eos``, or the
        text of the token that ends an answer. Raises MMJaxError where a template ends answers with
        another token than the model, and BadSample: empty_answer, end_mark (the text itself holds
        the end token), too_long (before any pixel is read), image_mismatch, and those of
        ``open_image``. max_tokens: ``model_max_length`` is a limit beside it.
        """
        check_answers(segments)
        order = image_order(segments, len(images))
        tokens, loss, visual = self._stream(segments).arrays()
        check_length(len(tokens), max_tokens and self._limit(max_tokens))
        check_targets(segments, loss)
        rows = image_rows([images[i] for i in order], self.config) if patches is None else patches
        return make_example(tokens, loss, visual, rows)

    def truncate(self, example: Example, max_tokens: int) -> Example:
        """Cut an example on the right at max_tokens or model_max_length, maybe inside an image.

        The peer cuts the text at model_max_length first and the spliced stream again; here only
        the stream is cut. Raises BadSample ``too_long`` when no target is left.
        """
        return limits.truncate(example, self._limit(max_tokens))

    def picture(self, row: np.ndarray) -> np.ndarray:
        """Draw one row of ``patches`` as uint8[h, w, 3]."""
        side = self.config.image_size
        return self.config.grey(row.reshape(side, side, 3))

    def encode_prompt(
        self, prompt: str | Sequence[int], images: Sequence[ImageSource] = ()
    ) -> Example:
        r"""Encode a question for generation; nothing is supervised.

        A string is tokenised as the peer would, with images where its ``<image>`` marks stand;
        without marks they stand in front, and a newline behind them. Token ids are used as they
        are: each -200 is an image, in order. Raises BadSample when there is not one mark for each
        image.
        """
        stream = TokenStream(self.tokenizer, self.folder)
        if isinstance(prompt, str):
            need_tokenizer(self.tokenizer, self.folder)
            if images and IMAGE_MARK not in prompt:
                prompt = f"{IMAGE_MARK * len(images)}\n{prompt}"
            stream.add(self.opening)
            pieces: list[Any] = prompt.split(IMAGE_MARK)
            add = stream.text
        else:
            ids = token_array(prompt)
            pieces = np.split(ids, np.flatnonzero(ids == IMAGE_ID))
            pieces[1:] = [piece[1:] for piece in pieces[1:]]
            add = stream.add
        if len(pieces) - 1 != len(images):
            raise mismatch("prompt", len(pieces) - 1, len(images))
        for row, piece in enumerate(pieces):
            if row:
                self._add_image(stream, row - 1)
            add(piece)
        return make_example(*stream.arrays(), image_rows(images, self.config))

    def decode(self, tokens: Sequence[int] | np.ndarray, scale: float = 1.0) -> str:
        """Turn generated ids into the answer's text, without white space around it.

        What follows the end token is dropped, and so are special tokens. scale is for families that
        speak in coordinates.
        """
        tokenizer, end = need_tokenizer(self.tokenizer, self.folder), self.config.eos_token_id
        ids = [int(token) for token in np.asarray(tokens).reshape(-1)]
        ids = ids[: ids.index(end)] if end in ids else ids
        ids = [i for i in ids if 0 <= i < len(tokenizer)]
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _stream(self, segments: Sequence[Segment]) -> TokenStream:
        """Lay segments out as one stream."""
        stream, end = TokenStream(self.tokenizer, self.folder), self.config.eos_token_id
        images = ends = 0
        for segment in segments:
            if segment.kind == "text":
                stream.text(str(segment.value), segment.loss)
            elif segment.kind == "image":
                self._add_image(stream, images)
                images += 1
            elif segment.value == "bos":
                stream.add(self.opening)
                ends += self.opening.count(end)
            else:
                stream.text(self._end_text(str(segment.value)), segment.loss)
                ends += 1
        tokens, _, visual = stream.arrays()
        if np.count_nonzero((tokens == end) & (visual < 0)) > ends:
            raise BadSample(
                "end_mark",
                f"the text itself holds {self._name(end)}, which ends an answer; take it out of "
                "the record",
            )
        return stream

    def _add_image(self, stream: TokenStream, row: int) -> None:
        stream.add(np.full(self.config.image_tokens, _AT_IMAGE, np.int32), visual=row)

    def _limit(self, max_tokens: int) -> int:
        return min(max_tokens, self.config.model_max_length or max_tokens)

    def _name(self, token: int) -> str:
        """Name a token for a message."""
        text = None if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(token)
        return f"{text} (id {token})" if text else f"id {token}"

    def _end_text(self, wanted: str) -> str:
        """Return the text of an end mark; raises MMJaxError unless it is what ends an answer."""
        tokenizer, end = need_tokenizer(self.tokenizer, self.folder), self.config.eos_token_id
        if wanted == "eos":
            return tokenizer.convert_ids_to_tokens(end)
        if self._ends.get(wanted) == end:
            return wanted
        if wanted not in ENDS.values():
            raise MMJaxError(
                f"Bunny has no special token {wanted!r}: the template is another family's; choose "
                "one of mmjax/data/templates_bunny.py"
            )
        names = [f"{name}_chat" for name, text in ENDS.items() if self._ends.get(text) == end]
        known = self._ends.get(wanted)
        fit = f"templates that fit it: {', '.join(names)}" if names else "no template fits it"
        if known is None:
            raise MMJaxError(
                f"the template ends an answer with {wanted}, which is no special token of the "
                f"tokenizer; that ends an answer with {self._name(end)}, and {fit}"
            )
        raise MMJaxError(
            f"the template ends an answer with {wanted} (id {known}) and the model with "
            f"{self._name(end)}; {fit}. Or set eos_token_id in the model's config to {known} and "
            f"the processor's end_token to {wanted!r}"
        )


def _end_id(tokenizer: Any, config: ProcessorConfig) -> int:
    """Return the id that ends an answer; raises MMJaxError where nothing names it."""
    if config.end_token is not None:
        end = tokenizer.get_added_vocab().get(config.end_token)
        if end is None:
            special = ", ".join(tokenizer.all_special_tokens)
            raise MMJaxError(
                f"end_token is {config.end_token!r}, which is no special token of the tokenizer; "
                f"those are {special}"
            )
        return end
    found = (config.eos_token_id, tokenizer.eos_token_id)
    end = next((i for i in found if i is not None), None)
    if end is None:
        raise MMJaxError(
            "the tokenizer names no token that ends a text; give eos_token_id in config.json, or "
            "the processor's end_token"
        )
    return end
