"""Pieces that every template is made of: turns split at their image marks, answers, names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mmjax.types import BadSample, Message, Record, Segment

IMAGE_MARK = "<image>"

Template = Callable[[Record], list[Segment]]


def need_answer(record: Record) -> None:
    """Raise BadSample ``empty_answer`` where the last turn is not the assistant's."""
    if not record.messages or record.messages[-1].role != "assistant":
        raise BadSample(
            "empty_answer",
            f"{name_record(record)}: the conversation does not end with an assistant turn, so "
            "there is nothing to train on; use a '*_prompt' template for inference",
        )


def messages_before_answer(record: Record) -> tuple[Message, ...]:
    """Return the turns up to the last question; raises BadSample where there is none."""
    messages = record.messages
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1].role != "user":
        raise BadSample("bad_record", f"{name_record(record)}: there is no question to answer")
    return messages


def answer(
    record: Record,
    message: Message,
    supervised: bool,
    *,
    space: str = "",
    end: str = "eos",
    strip: bool = True,
) -> list[Segment]:
    """Return an answer and the token that ends it; both are targets in training.

    space: what stands between the prompt and the answer, and belongs to the answer. strip: without
    the white space around it.
    """
    if not message.text.strip():
        raise BadSample("empty_answer", f"{name_record(record)}: an assistant turn is empty")
    if IMAGE_MARK in message.text:
        raise BadSample(
            "image_mismatch",
            f"{name_record(record)}: {IMAGE_MARK} stands in an assistant turn; only system and "
            "user turns may hold images",
        )
    text = space + (message.text.strip() if strip else message.text)
    return [Segment("text", text, supervised), Segment("special", end, supervised)]


def marked(record: Record) -> tuple[Message, ...]:
    """Return the turns; where no image has a mark, with all marks before the first question.

    Joined with those of other records, images without marks would all stand in front.
    """
    messages = list(record.messages)
    if not record.images or any(IMAGE_MARK in m.text for m in messages):
        return record.messages
    marks = IMAGE_MARK * len(record.images)
    at = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if at is None:
        return (Message("user", marks), *messages)
    messages[at] = dataclasses.replace(messages[at], text=marks + messages[at].text)
    return tuple(messages)


def count_marks(record: Record) -> int:
    """Count the marks of a record; raises BadSample ``image_mismatch`` for neither none nor all."""
    total = sum(m.text.count(IMAGE_MARK) for m in record.messages)
    if total not in (0, len(record.images)):
        raise BadSample(
            "image_mismatch",
            f"{name_record(record)}: {total} {IMAGE_MARK} mark(s) for {len(record.images)} "
            "image(s); write one mark for each image, or none to put them all in front",
        )
    return total


def place_images(
    record: Record, messages: tuple[Message, ...], *, verbatim: bool = False
) -> tuple[list[Segment], list[list[Segment]]]:
    """Split every turn at its marks; returns the images that open the prompt, and the turns.

    Without any mark all images open the prompt. Line ends that touch a mark go with it: they
    separate the mark from the text in LLaVA's files and are no part of the question; so does white
    space alone between two marks. verbatim: all of it is text.
    """
    front = [] if count_marks(record) else [Segment("image", i) for i in range(len(record.images))]
    turns: list[list[Segment]] = []
    index = 0
    for message in messages:
        pieces = message.text.split(IMAGE_MARK) if message.role != "assistant" else [message.text]
        parts: list[Segment] = []
        for i, piece in enumerate(pieces):
            if i > 0:
                at_start = not turns and not parts
                (front if at_start else parts).append(Segment("image", index))
                index += 1
                piece = piece if verbatim else piece.lstrip("\r\n")
            if i < len(pieces) - 1 and not verbatim:
                piece = piece.rstrip("\r\n")
            if piece.strip() or (piece and (verbatim or len(pieces) == 1)):
                parts.append(Segment("text", piece))
        turns.append(parts)
    return front, turns


def join_text(segments: list[Segment]) -> list[Segment]:
    """Join neighbouring text of the same kind: a tokenizer sees `User:q Assistant:` whole."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and segment.kind == last.kind == "text" and segment.loss == last.loss:
            joined[-1] = Segment("text", f"{last.value}{segment.value}", last.loss)
        else:
            joined.append(segment)
    return joined


def name_record(record: Record) -> str:
    """Name a record for a message: where it came from, as far as its meta tells."""
    meta = record.meta
    place = ":".join(str(meta[k]) for k in ("source", "line") if k in meta)
    return f"{place or 'record'} (id {meta.get('id', '?')})"
