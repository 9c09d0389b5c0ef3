"""What is cut to a limit: the images of a record, the tokens of a row, the records of a source."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmjax.data.turns import IMAGE_MARK
from mmjax.types import BadSample, Example, Message, Record


def first_images(record: Record, limit: int) -> Record:
    """Keep the first ``limit`` images of a record; the marks of the others go with them.

    A record whose marks are not one for each image is left to its template, which refuses it.
    """
    if len(record.images) <= limit:
        return record
    marks = sum(m.text.count(IMAGE_MARK) for m in record.messages)
    messages = record.messages
    if marks == len(record.images):
        left, cut = limit, []
        for message in messages:
            pieces = message.text.split(IMAGE_MARK)
            kept = min(left, len(pieces) - 1)
            left -= kept
            text = IMAGE_MARK.join([*pieces[:kept], _joined(pieces[kept:])])
            cut.append(Message(message.role, text))
        messages = tuple(cut)
    elif marks:
        return record
    return dataclasses.replace(record, messages=messages, images=record.images[:limit])


def truncate(example: Example, max_tokens: int) -> Example:
    """Cut an example on the right; visual rows that no token is left to point at go with it.

    Raises BadSample ``too_long`` when no target is left.
    """
    if len(example["tokens"]) <= max_tokens:
        return example
    cut = {
        name: value[:max_tokens] if name in _BY_TOKEN else value for name, value in example.items()
    }
    if not cut["loss_mask"][1:].any():
        raise BadSample(
            "too_long",
            f"the sample makes {len(example['tokens'])} tokens, and no target is among the first "
            f"{max_tokens}; raise seq_len or shorten the question",
        )
    rows = int(np.max(cut["visual_index"], initial=-1)) + 1
    return cut | {"patches": example["patches"][:rows]}


_BY_TOKEN = ("tokens", "positions", "loss_mask", "visual_index")


def _joined(pieces: list[str]) -> str:
    """Join the text around marks that are taken out; words stay apart."""
    text = pieces[0]
    for piece in pieces[1:]:
        space = ""
        if text and piece and not (text[-1].isspace() or piece[0].isspace()):
            space = " "
        if text.endswith("\n") or not text:
            piece = piece.lstrip("\r\n")
        text += space + piece
    return text


def spread(size: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` indices, evenly spread over ``size``, always the same; None: all."""
    if limit is None or limit >= size:
        return list(range(size))
    return [i * size // limit for i in range(limit)]
