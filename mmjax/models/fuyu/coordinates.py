"""Boxes and points in Fuyu's text: ``<box>y1, x1, y2, x2</box>`` and ``<point>x, y</point>``.

In the token stream a box is an open mark, four number tokens and a close mark, a point two numbers.
Each number is one token of the vocabulary and counts steps of two pixels of the resized image. This
is what the released Fuyu processor does (transformers 4.35); transformers 5 joins the digits of all
numbers into one string and loses them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.tokenize import token_id
from mmjax.types import BadSample

_TAG = re.compile(r"<(box|point)>(.*?)</\1>", re.DOTALL)
_COUNT = {"box": 4, "point": 2}
_MARKS = {"box": ("<0x00>", "<0x01>"), "point": ("<0x02>", "<0x03>")}


class Span(NamedTuple):
    """Characters ``start:end`` of a text: plain text (kind None) or one coordinate tag."""

    start: int
    end: int
    kind: str | None = None
    values: tuple[float, ...] = ()


def split_coordinates(text: str) -> Iterator[Span]:
    """Cut a text into plain spans and coordinate tags; a tag that is never closed stays text.

    Raises BadSample("bad_coordinates") when a closed tag does not hold its 4 or 2 numbers.
    """
    at = 0
    for match in _TAG.finditer(text):
        if match.start() > at:
            yield Span(at, match.start())
        kind, inside = match.groups()
        try:
            values = tuple(float(number) for number in inside.split(","))
        except ValueError:
            values = ()
        if len(values) != _COUNT[kind] or not np.all(np.isfinite(values)):
            shape = "y1, x1, y2, x2" if kind == "box" else "x, y"
            raise BadSample(
                "bad_coordinates", f"{match.group()!r} does not read <{kind}>{shape}</{kind}>"
            )
        yield Span(match.start(), match.end(), kind, values)
        at = match.end()
    if at < len(text):
        yield Span(at, len(text))


def to_steps(values: Sequence[float], scale: float) -> list[int]:
    """Turn pixels of the original image into steps of two resized pixels, halves to even."""
    return [int(np.round(value / 2 * scale)) for value in values]


def to_pixels(steps: Sequence[int], scale: float) -> list[int]:
    """Turn steps back into pixels of the original image, truncated as the peer does."""
    return [2 * int(step / scale) for step in steps]


class CoordinateTokens:
    """Translate coordinate tags to token ids and back with one tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._marks = {
            kind: tuple(token_id(tokenizer, mark) for mark in marks)
            for kind, marks in _MARKS.items()
        }
        self.mark_ids = {i for pair in self._marks.values() for i in pair if i is not None}

    def encode(self, span: Span, scale: float) -> np.ndarray:
        """Encode one tag, scale = resized height / original height: int32[6] or int32[4].

        Raises BadSample("bad_coordinates") when a number or a mark has no token of its own.
        """
        steps = to_steps(span.values, scale)
        names = [_MARKS[span.kind][0], *map(str, steps), _MARKS[span.kind][1]]
        ids = [token_id(self._tokenizer, name) for name in names]
        if None in ids:
            raise BadSample(
                "bad_coordinates",
                f"<{span.kind}> {span.values} at scale {scale:g} needs the token "
                f"{names[ids.index(None)]!r}, which the vocabulary lacks; is it outside the image?",
            )
        return np.asarray(ids, np.int32)

    def split_ids(self, ids: Sequence[int], scale: float) -> Iterator[tuple[list[int], str]]:
        """Yield (plain ids, tag text after them); marks without their numbers are dropped."""
        opens = {pair[0]: kind for kind, pair in self._marks.items() if pair[0] is not None}
        plain: list[int] = []
        at = 0
        while at < len(ids):
            kind = opens.get(ids[at])
            tag = self._read_tag(kind, ids[at : at + 6], scale) if kind else None
            if tag is not None:
                yield plain, tag
                plain = []
                at += _COUNT[kind] + 2
                continue
            if ids[at] not in self.mark_ids:
                plain.append(ids[at])
            at += 1
        yield plain, ""

    def _read_tag(self, kind: str, ids: Sequence[int], scale: float) -> str | None:
        """Read one tag at the start of ids; None when it is not whole."""
        count = _COUNT[kind]
        if len(ids) < count + 2 or ids[count + 1] != self._marks[kind][1]:
            return None
        numbers = self._tokenizer.convert_ids_to_tokens(list(ids[1 : count + 1]))
        if not all(re.fullmatch(r"-?\d+", number or "") for number in numbers):
            return None
        values = to_pixels([int(number) for number in numbers], scale)
        return f"<{kind}>{', '.join(map(str, values))}</{kind}>"
