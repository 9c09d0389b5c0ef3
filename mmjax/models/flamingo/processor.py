"""Flamingo's processor: text with ``<image>`` marks and media into tokens, and tokens into text.

An image is one token; what it shows reaches the text through cross attention, so each row of
``patches`` is a whole medium and ``visual_index`` says which one a token may look at. Tokens equal
what the peers' tokenizer makes of the peers' prompt strings, pixels what open_clip's or
transformers' CLIP transform makes of a picture. numpy and Pillow only: data workers load this.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.limits import truncate
from mmjax.data.tokenize import encode_text, load_tokenizer, supervised_tokens
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.flamingo.media import look_at, media_rows
from mmjax.models.flamingo.processor_config import ProcessorConfig
from mmjax.models.flamingo.special_tokens import ANSWER, EOC, complete_tokenizer, opening_ids
from mmjax.types import BadSample, Example, ImageSource, MMJaxError, Segment

__all__ = ["FlamingoProcessor", "ProcessorConfig"]


class FlamingoProcessor:
    """Encode prompts and media into Examples and decode answers, with one tokenizer or none.

    A medium is a picture (a path, bytes, a PIL image, uint8 pixels) or, with the option ``frames``,
    a list of so many. Float arrays are taken as normalised already, [h,w,3] as here or [3,h,w] as
    the peer's tensors are, a video [f,...] with its frames in front; h and w are image_size.
    """

    def __init__(self, config: ProcessorConfig | None = None, tokenizer: Any | None = None):
        """Take the ids of the special tokens from the tokenizer, or without one from the config.

        Tokens of Flamingo that the tokenizer lacks are added to it, see ``complete_tokenizer``.
        """
        config = config or ProcessorConfig()
        self.tokenizer = tokenizer
        self.folder: str | None = None
        self.opening: list[int] = []
        if tokenizer is not None:
            config = dataclasses.replace(config, **complete_tokenizer(tokenizer, config))
            self.opening = opening_ids(tokenizer, config.bos)
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> FlamingoProcessor:
        """Read a checkpoint folder; tokenizer files are optional until a string must be encoded."""
        processor = cls(ProcessorConfig.from_folder(folder), load_tokenizer(folder))
        processor.folder = os.fspath(folder)
        return processor

    @classmethod
    def for_words(cls, words: Sequence[str], config: Any) -> FlamingoProcessor:
        """Build one with a small tokenizer of these words, for models that start from nothing."""
        options = ProcessorConfig(
            image_size=config.vision.image_size,
            image_mean=tuple(config.image_mean),
            image_std=tuple(config.image_std),
            answer_token=True,
        )
        return cls(options, build_word_tokenizer(words))

    def with_options(self, **changes: Any) -> FlamingoProcessor:
        """Return a processor with other settings, such as ``frames=8`` or ``attend_mode="next"``.

        ``answer_token=True`` adds <answer> to the tokenizer, so the vocabulary may grow by a row.
        """
        other = FlamingoProcessor(dataclasses.replace(self.config, **changes), self.tokenizer)
        other.folder = self.folder
        return other

    def token_ids(self) -> dict[str, int]:
        """Return the vocabulary size and special ids under their names in config.json."""
        config = self.config
        ids = {
            # Rounded up, so that the table divides over any mesh.
            "vocab_size": -(-len(self.tokenizer) // 64) * 64,
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
            raise MMJaxError(
                f"the tokenizer has {len(self.tokenizer)} tokens, those of Flamingo included, but "
                f"the model's vocab_size is {config.vocab_size}; use the tokenizer the model was "
                "trained with, or raise vocab_size"
            )
        if own.media_token_id not in (None, config.media_token_id):
            raise MMJaxError(
                f"the tokenizer puts {own.image_mark} at {own.media_token_id} but the model's "
                f"media_token_id is {config.media_token_id}: they are of different checkpoints; "
                "use the tokenizer the model was trained with, or correct it in config.json"
            )
        if own.image_size != config.vision.image_size:
            raise MMJaxError(
                f"the processor makes pictures of {own.image_size} pixels and the vision tower "
                f"takes {config.vision.image_size}; set the processor's image_size to that"
            )
        for name in ("image_mean", "image_std"):
            mine, models = getattr(own, name), getattr(config, name)
            if not np.allclose(mine, models, rtol=0, atol=1e-6):
                raise MMJaxError(
                    f"preprocessor_config.json has {name} {list(mine)} and the model normalises "
                    f"with {list(models)}; make them equal, in config.json or there"
                )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the files that transformers' CLIPImageProcessor and AutoTokenizer load."""
        self.config.save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(os.fspath(folder))

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[ImageSource],
        *,
        max_tokens: int | None = None,
    ) -> Example:
        """Encode segments into an Example; text and special tokens are tokenised as one string.

        Special segments: ``bos`` is what the tokenizer begins with, maybe nothing, ``eoc``,
        ``answer``, ``eos``, and ``cut``, behind which the tokenizer starts anew. Raises BadSample:
        empty_answer, too_long (before any pixel is read), image_mismatch, frame_count, and those of
        ``open_image``.
        """
        _check_answers(segments)
        order = [int(s.value) for s in segments if s.kind == "image"]
        if sorted(order) != list(range(len(images))):
            raise BadSample("image_mismatch", _mismatch("template", len(order), len(images)))
        tokens, loss = self._tokens(segments)
        media = tokens == self.config.media_token_id
        if media.sum() != len(order):
            raise BadSample(
                "image_mismatch",
                f"the text itself holds {self.config.image_mark}: {media.sum()} marks for "
                f"{len(order)} images; take it out of the text",
            )
        if max_tokens is not None and len(tokens) > max_tokens:
            raise BadSample(
                "too_long",
                f"the sample makes {len(tokens)} tokens, above max_tokens = {max_tokens}; shorten "
                "the text or raise max_tokens",
            )
        if any(s.loss for s in segments) and not loss.any():
            raise BadSample("empty_answer", "no token lies inside the supervised text")
        mode = self.config.attend_mode
        if mode == "random":  # a coin of the sample's own, the same whenever it is met
            mode = ("previous", "next")[zlib.crc32(tokens.tobytes()) & 1]
        rows = media_rows([images[i] for i in order], self.config)
        return _example(tokens, loss, look_at(media, mode), rows)

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
        frames = row.reshape(-1, side, side, 3)
        if frames.dtype != np.uint8:
            mean, std = np.float32(self.config.image_mean), np.float32(self.config.image_std)
            grey = (np.float32(frames) * std + mean) * 255
            frames = np.uint8(np.clip(np.round(grey), 0, 255))
        return np.ascontiguousarray(frames.swapaxes(0, 1).reshape(side, -1, 3))

    def encode_prompt(
        self, prompt: str | Sequence[int], images: Sequence[ImageSource] = ()
    ) -> Example:
        """Encode a question for generation; nothing is supervised.

        A string is tokenised as the peer would, with its ``<image>`` marks where the images stand;
        without marks they stand in front. Token ids are used as they are: each ``media_token_id``
        is an image, in order. With ``attend_mode`` "random" text looks at the previous image.
        Raises MMJaxError when there is not one mark for each image.
        """
        config = self.config
        if isinstance(prompt, str):
            self._require_tokenizer()
            if config.image_mark not in prompt:
                prompt = config.image_mark * len(images) + prompt
            ids = encode_text(self.tokenizer, prompt)[0]
            tokens = np.concatenate([np.int32(self.opening), ids]).astype(np.int32)
        else:
            tokens = np.asarray(prompt).reshape(-1)
            if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
                raise MMJaxError(f"a prompt is a string or integer token ids, not {tokens.dtype}")
            tokens = tokens.astype(np.int32)
        media = tokens == config.media_token_id
        if media.sum() != len(images):
            raise BadSample("image_mismatch", _mismatch("prompt", int(media.sum()), len(images)))
        mode = "next" if config.attend_mode == "next" else "previous"
        rows = media_rows(list(images), config)
        return _example(tokens, np.zeros(len(tokens), bool), look_at(media, mode), rows)

    def decode(self, tokens: Sequence[int] | np.ndarray, scale: float = 1.0) -> str:
        """Turn generated ids into the answer's text; special tokens are dropped.

        What stands before the last <answer> is the prompt; what follows the first <|endofchunk|> or
        <eos> is dropped. scale is for families that speak in coordinates.
        """
        self._require_tokenizer()
        config = self.config
        ids = [int(token) for token in np.asarray(tokens).reshape(-1)]
        if config.answer_token_id in ids:
            ids = ids[len(ids) - ids[::-1].index(config.answer_token_id) :]
        ends = (config.eoc_token_id, config.eos_token_id)
        ids = ids[: next((i for i, token in enumerate(ids) if token in ends), None)]
        dropped = {config.media_token_id, config.pad_token_id}
        ids = [i for i in ids if 0 <= i < len(self.tokenizer) and i not in dropped]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _tokens(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Turn segments into ids int32[t] and targets bool[t]."""
        ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        loss: list[np.ndarray] = [np.zeros(0, bool)]
        run: list[tuple[str, bool]] = []

        def close_run() -> None:
            if run:
                self._require_tokenizer()
                found, spans = encode_text(self.tokenizer, "".join(part for part, _ in run))
                ids.append(found)
                loss.append(supervised_tokens(spans, run))
                run.clear()

        marks = {"eoc": EOC, "answer": ANSWER}
        for segment in segments:
            if segment.kind == "text":
                run.append((str(segment.value), segment.loss))
            elif segment.kind == "image":
                run.append((self.config.image_mark, False))
            elif segment.value in marks:
                self._require_special(str(segment.value))
                run.append((marks[str(segment.value)], segment.loss))
            elif segment.value in ("bos", "eos", "cut"):
                close_run()
                end = [self.config.eos_token_id] if segment.value == "eos" else []
                ids.append(np.int32(self.opening if segment.value == "bos" else end))
                loss.append(np.full(len(ids[-1]), segment.loss, bool))
            else:
                raise MMJaxError(
                    f"Flamingo has no special token {segment.value!r}: the template is another "
                    "family's; choose one of mmjax/data/templates_flamingo.py"
                )
        close_run()
        return np.concatenate(ids), np.concatenate(loss)

    def _require_special(self, name: str) -> None:
        if getattr(self.config, f"{name}_token_id") is None:
            raise MMJaxError(
                f"the template asks for the token {name!r}, which the tokenizer lacks; "
                "processor.answer_token=True adds Otter's, or use another template"
            )

    def _require_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise MMJaxError(
                f"{self.folder or 'this processor'} has no tokenizer.json or tokenizer.model, so "
                "text cannot be encoded or decoded; put the language model's tokenizer files "
                "beside its config.json, or give the prompt as token ids"
            )


def _example(tokens: np.ndarray, loss: np.ndarray, visual: np.ndarray, rows: np.ndarray) -> Example:
    return {
        "tokens": tokens,
        "positions": np.arange(len(tokens), dtype=np.int32),
        "loss_mask": loss,
        "visual_index": visual,
        "patches": rows,
    }


def _mismatch(what: str, marks: int, images: int) -> str:
    """Say how marks and images differ, and what to do."""
    return (
        f"the {what} holds {marks} <image> mark(s) and there are {images} image(s): "
        + ("more marks than images" if marks > images else "images without marks")
        + "; give one mark for each image, where it stands, and one image for each mark"
    )


def _check_answers(segments: Sequence[Segment]) -> None:
    """Refuse supervised stretches that hold no text: they would train the end mark alone."""
    stretch: list[Segment] = []
    for segment in [*segments, None]:
        if segment is not None and segment.loss:
            stretch.append(segment)
            continue
        text = "".join(str(s.value) for s in stretch if s.kind == "text")
        if stretch and not text.strip():
            raise BadSample("empty_answer", "an answer is empty; drop the record or fill it in")
        stretch = []
