"""Templates: from a record to segments that know whether they are supervised.

A template is a plain function ``template(record) -> list[Segment]``; ``TEMPLATES`` holds them by
name. Labels are decided here and nowhere else: a token is a target exactly when its segment says
``loss=True``, so no later step has to search the tokens for answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

IMAGE_MARK = "<image>"

Template = Callable[[Record], list[Segment]]


def fuyu_chat(record: Record) -> list[Segment]:
    """Lay a conversation out for training, as OtterHD does: every answer and its eos is a target.

    A turn is ``User:{q} Assistant:`` <answer> ``{a}`` <eos>; <bos> stands once, behind the images
    that open the prompt. A system message is a line of its own before the first turn. Raises
    BadSample ``empty_answer`` (also when there is no answer at all) and ``image_count``.
    """
    if not record.messages or record.messages[-1].role != "assistant":
        raise BadSample(
            "empty_answer",
            f"{_name(record)}: the conversation does not end with an assistant turn, so there is "
            "nothing to train on; use the template 'fuyu_prompt' for inference",
        )
    return _fuyu(record, record.messages, supervised=True)


def fuyu_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer: the same tokens as ``fuyu_chat``, no targets.

    Ends with the <answer> token; a conversation that already ends with the user is taken whole.
    """
    messages = record.messages
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1].role != "user":
        raise BadSample("bad_record", f"{_name(record)}: there is no question to answer")
    return _fuyu(record, messages, supervised=False)


def plain(record: Record) -> list[Segment]:
    """Lay out bare text, without speaker names: images, <bos>, each turn; answers are targets."""
    front, turns = _place_images(record, record.messages)
    segments = [*front, Segment("special", "bos")]
    for message, parts in zip(record.messages, turns, strict=True):
        if message.role == "assistant":
            segments += _answer(record, message, supervised=True)
        else:
            segments += parts
    if not any(s.loss for s in segments):
        raise BadSample("empty_answer", f"{_name(record)}: no assistant turn to train on")
    return segments


TEMPLATES: dict[str, Template] = {
    "fuyu_chat": fuyu_chat,
    "fuyu_prompt": fuyu_prompt,
    "plain": plain,
}


def get_template(name: str | Template) -> Template:
    """Return a template by name, or the function itself; raises MMJaxError with the nearest."""
    if callable(name):
        return name
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MMJaxError(f"unknown template {name!r}{hint} (there are {', '.join(TEMPLATES)})")
    return TEMPLATES[name]


def _fuyu(record: Record, messages: tuple[Message, ...], supervised: bool) -> list[Segment]:
    """Write messages out in the Fuyu dialogue format; a last user turn ends with <answer>."""
    front, turns = _place_images(record, messages)
    segments = [*front, Segment("special", "bos")]
    for message, parts in zip(messages, turns, strict=True):
        if message.role == "system":
            segments += [*parts, Segment("text", "\n")]
        elif message.role == "user":
            segments += [Segment("text", "User:"), *parts, Segment("text", " Assistant:")]
            segments.append(Segment("special", "answer"))
        else:
            segments += _answer(record, message, supervised)
    return _join_text(segments)


def _answer(record: Record, message: Message, supervised: bool) -> list[Segment]:
    """Return an answer and the eos that ends it; both are targets in training."""
    if not message.text.strip():
        raise BadSample("empty_answer", f"{_name(record)}: an assistant turn is empty")
    if IMAGE_MARK in message.text:
        raise BadSample(
            "image_count",
            f"{_name(record)}: {IMAGE_MARK} stands in an assistant turn; only system and user "
            "turns may hold images",
        )
    text = message.text.strip()
    return [Segment("text", text, supervised), Segment("special", "eos", supervised)]


def _place_images(
    record: Record, messages: tuple[Message, ...]
) -> tuple[list[Segment], list[list[Segment]]]:
    """Split every turn at its marks; returns the images that open the prompt, and the turns.

    Without any mark all images open the prompt. Line ends that touch a mark go with it: they
    separate the mark from the text in LLaVA's files and are no part of the question.
    """
    total = sum(m.text.count(IMAGE_MARK) for m in record.messages)
    if total not in (0, len(record.images)):
        raise BadSample(
            "image_count",
            f"{_name(record)}: {total} {IMAGE_MARK} mark(s) for {len(record.images)} image(s); "
            "write one mark for each image, or none to put them all in front",
        )
    front = [] if total else [Segment("image", i) for i in range(len(record.images))]
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
                piece = piece.lstrip("\n")
            if i < len(pieces) - 1:
                piece = piece.rstrip("\n")
            if piece.strip() or (piece and len(pieces) == 1):
                parts.append(Segment("text", piece))
        turns.append(parts)
    return front, turns


def _join_text(segments: list[Segment]) -> list[Segment]:
    """Join neighbouring text of the same kind: a tokenizer sees `User:q Assistant:` whole."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and segment.kind == last.kind == "text" and segment.loss == last.loss:
            joined[-1] = Segment("text", f"{last.value}{segment.value}", last.loss)
        else:
            joined.append(segment)
    return joined


def _name(record: Record) -> str:
    """Name a record for a message: where it came from, as far as its meta tells."""
    meta = record.meta
    place = ":".join(str(meta[k]) for k in ("source", "line") if k in meta)
    return f"{place or 'record'} (id {meta.get('id', '?')})"
