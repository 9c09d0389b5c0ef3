"""Documents with pictures among their sentences: from MMC4's fields to a record.

A document names how alike each picture and each sentence are, or which belong together; a picture
is put before its sentence. Whatever the documents are kept in (``mmc4``, ``tfds_pretraining``),
this is what makes their records, for the template ``interleaved``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from mmjax.data.assignment import best_assignment
from mmjax.data.parquet import decode_base64
from mmjax.data.turns import IMAGE_MARK
from mmjax.types import BadSample, Message, MMJaxError, Record

TEMPLATE = "interleaved"  # no other lays out documents
ASSIGNMENTS = ("argmax", "one_to_one", "matched")
_GPT_MARK = re.compile(r"_!_IMAGE(\d+)_!_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interleave:
    """Makes records of documents, filtered as OpenFlamingo filters them.

    A picture is used where it has more than min_kilobytes (whole thousands of bytes; None takes
    all) and a similarity of at least textsim_threshold to its sentence; of those the first
    max_images. A document needs min_images; one with a single picture is kept with a chance of
    single_image_share, by its id and seed.

    assignment: ``argmax``, each picture to the sentence most like it, as the code of the published
    models does (open-flamingo 2.0.1; the default, because threshold and shares were chosen with
    it); ``one_to_one``, at most one picture a sentence and the largest sum of similarities, as its
    repository does since; ``matched``, the pairs that MMC4's own files name.
    legacy_openflamingo: its two faults, too. It hands pictures over in the order of the file, so
    that marks get each other's pictures where the sentences are in another order; and it cuts a
    ChatGPT sequence of more than max_images one picture early.

    Reasons of a BadSample beside those of broken data: ``too_few_images``, ``single_image``.
    """

    textsim_threshold: float = 0.24
    assignment: str = "argmax"
    max_images: int = 6
    min_images: int = 1
    min_kilobytes: int | None = 10
    single_image_share: float = 0.5
    legacy_openflamingo: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.assignment not in ASSIGNMENTS:
            raise MMJaxError(f"assignment {self.assignment!r} is none of {', '.join(ASSIGNMENTS)}")
        fits = 1 <= self.min_images <= self.max_images
        if not fits or not 0 <= self.single_image_share <= 1:
            raise MMJaxError(
                f"MMC4 min_images {self.min_images}, max_images {self.max_images}, "
                f"single_image_share {self.single_image_share}: want 1 <= min_images <= max_images "
                "and a share from 0 to 1"
            )

    def record(self, info: Mapping[str, Any], where: str, meta: Mapping[str, Any]) -> Record:
        """Return the record of a document; raises BadSample naming the place.

        info: ``text_list``; ``image_info``, each with ``image_base64`` or with ``image``, its file
        as bytes, or neither; and ``similarity_matrix``, or ``matched_text_index`` and
        ``matched_sim`` of each picture. Or a ChatGPT sequence: ``is_gpt``, ``example`` and
        ``image_map``. meta: of the record; its ``id`` decides on a single picture.
        """
        gpt = "is_gpt" in info
        text, images = (self._gpt if gpt else self._interleave)(info, where)
        if len(images) < self.min_images:
            raise BadSample(
                "too_few_images",
                f"{where}: {len(images)} picture(s) are left, min_images is {self.min_images}",
            )
        if not gpt and len(images) == 1 and self._draw(meta["id"]) >= self.single_image_share:
            raise BadSample(
                "single_image",
                f"{where}: one picture; single_image_share {self.single_image_share} "
                "keeps some of these, by id and seed",
            )
        return Record((Message("user", text),), tuple(images), meta)

    def _interleave(self, info: Mapping[str, Any], where: str) -> tuple[str, list[bytes]]:
        """Return the text with a mark before each picture's sentence, and the pictures."""
        sentences = _sentences(info, where)
        listed = info.get("image_info")
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise _bad(where, "field 'image_info' is no list of pictures")
        held: dict[int, bytes] = {}
        for place, one in enumerate(listed):
            data = _picture(one, f"{where}: picture {place}")
            if data is not None and (
                self.min_kilobytes is None or len(data) // 1000 > self.min_kilobytes
            ):
                held[place] = data
        chosen = self._pairs(info, list(held), len(sentences), where)[: self.max_images]
        images = [held[place] for place, _ in chosen]
        if not self.legacy_openflamingo:  # the marks stand in the order of the sentences
            order = sorted(range(len(chosen)), key=lambda i: chosen[i][1])
            images = [images[i] for i in order]
        marks = [0] * len(sentences)
        for _, sentence in chosen:
            marks[sentence] += 1
        text = " ".join(IMAGE_MARK * n + s for n, s in zip(marks, sentences, strict=True))
        return text, images

    def _pairs(
        self, info: Mapping[str, Any], places: list[int], sentences: int, where: str
    ) -> list[tuple[int, int]]:
        """Return (picture, sentence) of those that are alike enough, in the order of the file."""
        if not places:
            return []
        if self.assignment == "matched":
            found = [
                _match(info["image_info"][i], sentences, f"{where}: picture {i}") for i in places
            ]
            columns, scores = [c for c, _ in found], _floats([s for _, s in found])
        else:
            alike = _similarities(info, sentences, where)[places]
            one_to_one = self.assignment == "one_to_one"
            columns = best_assignment(alike) if one_to_one else alike.argmax(1)
            scores = alike[np.arange(len(places)), columns]
        # In the precision of the scores: 0.24 kept as float32 is below 0.24.
        threshold = scores.dtype.type(self.textsim_threshold)
        return [
            (place, int(column))
            for place, column, score in zip(places, columns, scores, strict=True)
            if column >= 0 and score >= threshold
        ]

    def _gpt(self, info: Mapping[str, Any], where: str) -> tuple[str, list[bytes]]:
        """Return text and pictures of a ChatGPT sequence, whose text holds ``_!_IMAGE1_!_``."""
        text, held = info.get("example"), info.get("image_map")
        if not isinstance(text, str) or not isinstance(held, dict):
            raise _bad(where, "a ChatGPT sequence has a text 'example' and an object 'image_map'")
        _refuse_marks(text, where)
        marks = list(_GPT_MARK.finditer(text))
        if len(marks) > self.max_images:
            kept = self.max_images - self.legacy_openflamingo
            text, marks = text[: marks[kept].start()], marks[:kept]
        numbers = [int(mark[1]) for mark in marks]
        if self.legacy_openflamingo:
            numbers = list(range(1, len(marks) + 1))
        images = []
        for number in numbers:
            one = held.get(f"_!_IMAGE{number}_!_")
            if not isinstance(one, dict):
                raise BadSample(
                    "image_mismatch", f"{where}: 'image_map' lacks picture {number} of 'example'"
                )
            images.append(_decoded(one.get("base64_image"), f"{where}: picture {number}"))
        return _GPT_MARK.sub(IMAGE_MARK, text), images

    def _draw(self, name: str) -> float:
        """Return a number in [0, 1), a function of (seed, id)."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") / 2**56


def _sentences(info: Mapping[str, Any], where: str) -> list[str]:
    sentences = info.get("text_list")
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise _bad(where, "field 'text_list' is no list of sentences")
    for sentence in sentences:
        _refuse_marks(sentence, where)
    return sentences


def _similarities(info: Mapping[str, Any], sentences: int, where: str) -> np.ndarray:
    """Return float[pictures, sentences], how alike they are."""
    try:
        found = _floats(info.get("similarity_matrix"))
    except (TypeError, ValueError, OverflowError):  # the last of an integer that no float holds
        found = np.zeros(0)
    wanted = (len(info["image_info"]), sentences)
    if found.shape != wanted or not sentences or not np.isfinite(found).all():
        raise _bad(
            where,
            f"'similarity_matrix' has the shape {list(found.shape)}; wanted are numbers, one row "
            f"for each of {wanted[0]} pictures and in it one for each of {wanted[1]} sentences",
        )
    return found


def _match(one: Mapping[str, Any], sentences: int, where: str) -> tuple[int, float]:
    """Read the sentence that the file names for a picture, and how alike they are."""
    index, score = one.get("matched_text_index"), one.get("matched_sim")
    both = isinstance(index, int) and isinstance(score, Real)
    if isinstance(score, int) and abs(score) > sys.float_info.max:  # JSON's have no largest
        both = False
    if not both or not 0 <= index < sentences:
        raise _bad(
            where,
            f"'matched_text_index' {index!r} and 'matched_sim' {score!r} name none of "
            f"{sentences} sentences; another assignment needs neither",
        )
    return index, score


def _floats(values: Any) -> np.ndarray:
    """Return values as float32 where they are kept so, else as float64."""
    found = np.asarray(values)
    return found if found.dtype == np.float32 else found.astype(np.float64)


def _picture(one: Mapping[str, Any], where: str) -> bytes | None:
    """Return the file of a picture; None where it could not be downloaded."""
    if isinstance(one.get("image"), bytes):
        return one["image"]
    return None if one.get("image_base64") is None else _decoded(one["image_base64"], where)


def _decoded(text: Any, where: str) -> bytes:
    """Decode base64; the peer's converter once wrote Python's ``b'...'`` around it."""
    if not isinstance(text, str):
        raise BadSample("corrupt_image", f"{where}: is {type(text).__name__}, not base64 text")
    if text[:2] in ("b'", 'b"'):
        text = text[2:-1]
    return decode_base64(text, where)


def _refuse_marks(text: str, where: str) -> None:
    if IMAGE_MARK in text:
        raise BadSample("image_mismatch", f"{where}: the text itself holds {IMAGE_MARK}")


def _bad(where: str, message: str) -> BadSample:
    return BadSample("bad_record", f"{where}: {message}")
