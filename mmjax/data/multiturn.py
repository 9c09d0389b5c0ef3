"""Turns of other records behind those of a record, so that one sample is a longer conversation.

instruct_flamingo's ``multiturn_augmentation`` (instruction_tuning/data.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from mmjax.data.mixture import Mixture
from mmjax.data.turns import Template, marked, need_answer
from mmjax.types import BadSample, Message, MMJaxError, Record


@dataclasses.dataclass(frozen=True)
class Multiturn:
    """How many records are put behind a record, as further turns of the same conversation.

    turns: how many are drawn. max_images: nothing more is added once a sample would reach this many
    images, so that it has fewer; None for no limit. max_tokens: what would make the sample longer
    than this is not added, nor what was drawn after it; None for no budget: then ``too_long`` says
    what becomes of a sample that fits into no row.
    """

    turns: int
    max_images: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("turns", "max_images", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MMJaxError(f"multiturn.{name} is {value}; give 1 or more, or leave it out")


def up_to(first: Record, others: Iterable[Record], max_images: int | None) -> list[Record]:
    """Return the first record and those of the others that follow it, in their order.

    The first that would bring the images to ``max_images`` ends it; others behind it are not asked
    for, even if they have fewer images.
    """
    kept, images = [first], len(first.images)
    for other in others:
        images += len(other.images)
        if max_images is not None and images >= max_images:
            break
        kept.append(other)
    return kept


def draw_others(
    mixture: Mixture, template: Template, turns: int, rng: np.random.Generator
) -> Iterator[Record]:
    """Draw records: a source by its share of an epoch, then any of its records, with replacement.

    One that cannot be used is passed over and still counts among ``turns``; it is told when its own
    turn comes.
    """
    for _ in range(turns):
        number, _ = mixture.pick(int(rng.integers(mixture.epoch)))
        source = mixture.sources[number]
        try:
            other = source[int(rng.integers(len(source)))]
            need_answer(other)
            template(other)
        except BadSample:
            continue
        yield other


def join(records: list[Record]) -> Record:
    """Join records into one conversation; system messages of all but the first are left out.

    Images that open a record without a mark get their marks before its first question. meta is the
    first record's. Raises BadSample ``empty_answer`` where that does not end with an answer.
    """
    if len(records) == 1:
        return records[0]
    need_answer(records[0])
    messages: list[Message] = []
    for number, record in enumerate(records):
        turns = [m for m in marked(record) if number == 0 or m.role != "system"]
        messages += turns
    images = tuple(image for record in records for image in record.images)
    return dataclasses.replace(records[0], messages=tuple(messages), images=images)
