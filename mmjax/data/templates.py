"""Templates: from a record to segments that know whether they are supervised.

A template is a plain function ``template(record) -> list[Segment]``; ``TEMPLATES`` holds them by
name. Labels are decided here and nowhere else: a token is a target exactly when its segment says
``loss=True``, so no later step has to search the tokens for answers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from mmjax.data import templates_bunny as bunny
from mmjax.data import templates_flamingo as flamingo
from mmjax.data.turns import (
    IMAGE_MARK,
    Template,
    answer,
    join_text,
    messages_before_answer,
    name_record,
    need_answer,
    place_images,
)
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment, nearest


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """The words of a dialogue format; <answer> and <eos> are the tokenizer's own marks.

    question: what stands before a question; prompt: between it and <answer>. images_inside: the
    images that open the prompt stand behind the first ``question`` text instead of before <bos>,
    and ``after_images`` closes them. eos_after_question: so does Idefics. between: before every
    turn but the first.
    """

    question: str
    prompt: str
    images_inside: bool = False
    after_images: str = ""
    eos_after_question: bool = False
    between: str = ""


# The formats of Otter's pipeline/mimicit_utils/mimicit_dataset.py (process_text_formatting). Its
# <answer> is the tokenizer's begin-of-answer token here, <|endofchunk|> and <end_of_utterance> are
# <eos>, and <fake_token_around_image> is left out: Fuyu closes an image by its row ends.
FUYU = Dialogue("User:", " Assistant:")
FUYU_SPACED = Dialogue("User: ", " Assistant:")
SIMPLE = Dialogue("User:", " GPT:")
LLAMA2 = Dialogue("[INST]", "[/INST]", images_inside=True, after_images="\n")
IDEFICS = Dialogue(
    "User:", "\nAssistant:", images_inside=True, eos_after_question=True, between="\n"
)


def fuyu_chat(record: Record) -> list[Segment]:
    """Lay a conversation out for training, as OtterHD does: every answer and its eos is a target.

    A turn is ``User:{q} Assistant:`` <answer> ``{a}`` <eos>; <bos> stands once, behind the images
    that open the prompt. A system message is a line of its own before the first turn. Raises
    BadSample ``empty_answer`` (also when there is no answer at all) and ``image_mismatch``.
    """
    return _chat(record, FUYU)


def fuyu_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer: the same tokens as ``fuyu_chat``, no targets.

    Ends with the <answer> token; a conversation that already ends with the user is taken whole.
    """
    return _prompt(record, FUYU)


def fuyu_spaced_chat(record: Record) -> list[Segment]:
    """Lay out as ``fuyu_chat`` with a space before the question: ``User: {q} Assistant:``."""
    return _chat(record, FUYU_SPACED)


def fuyu_spaced_prompt(record: Record) -> list[Segment]:
    """Lay out a prompt as OtterHD's benchmarks and demos ask: ``User: {q} Assistant:`` <answer>.

    The peer's training has no such space (benchmarks/models/otterhd.py against
    mimicit_dataset.py); ask a model the way it was trained.
    """
    return _prompt(record, FUYU_SPACED)


def simple_chat(record: Record) -> list[Segment]:
    """Lay out Otter's simple format: ``User:{q} GPT:`` <answer> ``{a}`` <eos>."""
    return _chat(record, SIMPLE)


def simple_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``simple_chat``, no targets."""
    return _prompt(record, SIMPLE)


def llama2_chat(record: Record) -> list[Segment]:
    """Lay out ``[INST]{q}[/INST]`` <answer> ``{a}`` <eos>, images and a line end behind [INST]."""
    return _chat(record, LLAMA2)


def llama2_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``llama2_chat``, no targets."""
    return _prompt(record, LLAMA2)


def idefics_chat(record: Record) -> list[Segment]:
    """Lay out ``User:{images}{q}`` <eos>, then on a new line ``Assistant:`` <answer> ``{a}`` <eos>.

    The <eos> behind the question is no target.
    """
    return _chat(record, IDEFICS)


def idefics_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``idefics_chat``, no targets."""
    return _prompt(record, IDEFICS)


def plain(record: Record) -> list[Segment]:
    """Lay out bare text, without speaker names: images, <bos>, each turn; answers are targets."""
    front, turns = place_images(record, record.messages)
    segments = [*front, Segment("special", "bos")]
    for message, parts in zip(record.messages, turns, strict=True):
        if message.role == "assistant":
            segments += answer(record, message, supervised=True)
        else:
            segments += parts
    if not any(s.loss for s in segments):
        raise BadSample("empty_answer", f"{name_record(record)}: no assistant turn to train on")
    return segments


def fuyu_legacy_otter(record: Record) -> list[Segment]:
    """Lay out ``fuyu_chat`` with the faults of OtterHD's own code, for its published numbers.

    Text loses its symbols (``strip_symbols``). White space around an answer stays: MimicitSource
    has taken it off before symbols went. Answers but the last have no <eos>. Targets are what
    ``get_labels`` of Otter's src/otter_ai/models/fuyu/processing_fuyu.py takes, the tokens behind
    the first <answer> up to and with the second, and the last <eos>: with several turns that is the
    first answer, then the second *question*; no later answer is ever learnt. A single turn comes
    out as in ``fuyu_chat``, symbols aside.
    """
    need_answer(record)
    stripped = tuple(
        m
        if m.role == "system"
        else dataclasses.replace(m, text=strip_symbols(m.text, m.role == "assistant"))
        for m in record.messages
    )
    record = dataclasses.replace(record, messages=stripped)
    front, turns = place_images(record, record.messages)
    segments = [*front, Segment("special", "bos")]
    answers = 0
    for message, parts in zip(record.messages, turns, strict=True):
        if message.role == "system":
            segments += [*parts, Segment("text", "\n")]
            continue
        if message.role == "assistant":
            answers += 1
            segments += answer(record, message, supervised=answers == 1, strip=False)[:1]
            continue
        turn = [Segment("text", "User:"), *parts, Segment("text", " Assistant:")]
        turn.append(Segment("special", "answer"))
        segments += [dataclasses.replace(s, loss=answers == 1 and s.kind != "image") for s in turn]
    return join_text([*segments, Segment("special", "eos", True)])


def strip_symbols(text: str, answer: bool = False) -> str:
    """Remove all but letters, digits, white space and ``.,?!()"'``, as Otter did by default.

    Reproduces ``pre_question`` and, for an answer, ``pre_answer`` of Otter's
    pipeline/mimicit_utils/mimicit_dataset.py without ``--keep_symbols``: code, formulas, dates
    and markdown are damaged, and every run of white space becomes one space. Image marks stay. An
    answer keeps the space that a symbol leaves at an end: ``- One`` begins with it.
    """
    parts = (re.sub(r"[^\w\s.,?!()\"']", "", part) for part in text.split(IMAGE_MARK))
    if not answer:
        parts = (part.strip(" ") for part in parts)
    ends = "\n" if answer else " \n"
    return IMAGE_MARK.join(re.sub(r"\s{2,}", " ", part).strip(ends) for part in parts)


TEMPLATES: dict[str, Template] = {
    template.__name__: template
    for template in (
        *(fuyu_chat, fuyu_prompt, fuyu_spaced_chat, fuyu_spaced_prompt, fuyu_legacy_otter),
        *(simple_chat, simple_prompt, llama2_chat, llama2_prompt, idefics_chat, idefics_prompt),
        plain,
        *flamingo.TEMPLATES,
        *bunny.TEMPLATES,
    )
}
"""Every template by its name: ``*_chat`` to train on, ``*_prompt`` to generate from."""


def get_template(name: str | Template) -> Template:
    """Return a template by name, or the function itself; raises MMJaxError with the nearest."""
    if callable(name):
        return name
    if name not in TEMPLATES:
        near = nearest(name, TEMPLATES)
        raise MMJaxError(f"unknown template {name!r}{near} (there are {', '.join(TEMPLATES)})")
    return TEMPLATES[name]


def answered(name: str) -> Template:
    """Return the template that lays out what this one asks with the answer behind it.

    ``x_chat`` for ``x_prompt``. Raises MMJaxError where there is none.
    """
    chat = f"{str(name).removesuffix('_prompt')}_chat"
    if not str(name).endswith("_prompt") or chat not in TEMPLATES:
        raise MMJaxError(
            f"template {name!r} does not say how an answer stands behind it; ask with one of "
            f"{', '.join(x for x in TEMPLATES if x.endswith('_prompt'))}"
        )
    return TEMPLATES[chat]


def asking(trained: Iterable[str]) -> str:
    """Return the name of the template that asks as these train: ``x_prompt`` for ``x_chat``.

    Raises MMJaxError where there is none, where they ask differently, and for an unknown one.
    """
    names = list(dict.fromkeys(trained))
    for name in names:
        get_template(name)
    asked = {f"{name.removesuffix('_chat')}_prompt" for name in names}
    if len(asked) == 1 and asked <= TEMPLATES.keys():
        return asked.pop()
    raise MMJaxError(
        f"data.template is {' and '.join(names)}, which does not tell how tasks are asked; set "
        f"eval.template to one of {', '.join(t for t in TEMPLATES if t.endswith('_prompt'))}"
    )


def _chat(record: Record, words: Dialogue) -> list[Segment]:
    """Write a whole conversation out, every answer a target."""
    need_answer(record)
    return _dialogue(record, record.messages, words, supervised=True)


def _prompt(record: Record, words: Dialogue) -> list[Segment]:
    """Write out what stands before the last answer."""
    return _dialogue(record, messages_before_answer(record), words, supervised=False)


def _dialogue(
    record: Record, messages: tuple[Message, ...], words: Dialogue, supervised: bool
) -> list[Segment]:
    """Write messages out in a format; a last user turn ends with <answer>."""
    front, turns = place_images(record, messages)
    segments = [] if words.images_inside else front
    opening = front if words.images_inside else []
    segments = [*segments, Segment("special", "bos")]
    asked = False
    for message, parts in zip(messages, turns, strict=True):
        if message.role == "system":
            segments += [*parts, Segment("text", "\n")]
        elif message.role == "user":
            segments.append(Segment("text", words.between * asked + words.question))
            segments += _close_images([*opening, *parts], words.after_images)
            opening, asked = [], True
            if words.eos_after_question:
                segments.append(Segment("special", "eos"))
            segments += [Segment("text", words.prompt), Segment("special", "answer")]
        else:
            segments += answer(record, message, supervised)
    return join_text(segments)


def _close_images(parts: list[Segment], text: str) -> list[Segment]:
    """Put a text behind the images that a turn begins with."""
    images = next((i for i, part in enumerate(parts) if part.kind != "image"), len(parts))
    return [*parts[:images], *([Segment("text", text)] if images and text else []), *parts[images:]]
