"""Flamingo's templates: Otter's, OpenFlamingo's, Guanaco's and those of pretraining.

An image is one ``<image>`` token here, and text looks at it through cross attention, so images
stand where the peers put them: before the turn that asks about them, or inside it. Special segments
of this family beside <bos> and <eos>: ``eoc`` is ``<|endofchunk|>``, ``answer`` is Otter's
``<answer>``, and ``cut`` is no token: the peer tokenises what stands before and behind it apart.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mmjax.data.turns import (
    IMAGE_MARK,
    answer,
    join_text,
    messages_before_answer,
    name_record,
    need_answer,
    place_images,
)
from mmjax.types import BadSample, Message, Record, Segment

GUANACO_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

_BOS = Segment("special", "bos")


@dataclasses.dataclass(frozen=True)
class Turns:
    """The words of a dialogue format.

    question: what stands before a question; prompt: between it and its answer. before_answer: the
    special segment behind ``prompt``. space: what an answer begins with. end: the token that ends
    it. between: before every turn but the first. images_first: images that open a turn stand
    before ``question``, not behind it. system: the line that a record without a system message
    gets. ask: False leaves the words of the question out. verbatim: white space around marks and
    answers stays as it is written. close: <eos> ends the whole conversation, and is a target.
    image_end: <|endofchunk|> stands behind every image of a question.
    """

    question: str
    prompt: str
    before_answer: Literal["answer", "cut"] | None = None
    space: str = ""
    end: Literal["eoc", "eos"] = "eoc"
    between: str = ""
    images_first: bool = True
    system: str = ""
    ask: bool = True
    verbatim: bool = False
    close: bool = False
    image_end: bool = False


# Otter writes spaces around question and answer in its first release and in every inference script
# (and OTTER-Image-MPT7B's in-context examples); pipeline/mimicit_utils/mimicit_dataset.py of its
# last version trains without them. Both put <bos> and <eos> around a row; the <eos> is learnt.
OTTER = Turns("User: ", " GPT:", "answer", space=" ", close=True)
OTTER_TIGHT = Turns("User:", " GPT:", "answer", close=True)
# open_flamingo/eval/eval_model.py and its subclasses; evaluate.py ends each example with a newline.
CAPTION = Turns("Output:", "", between="\n", ask=False)
VQA = Turns("Question:", " Short answer:", between="\n")
CLASS = Turns("", "")
# instruct_flamingo's instruction_tuning/data.py. The prompt ends with a space, which a tokenizer
# would join to the answer's first word: the peer tokenises them apart. It so begins each part with
# LLaMA's <s>, which stands here once; MPT, of which its models are, has none.
GUANACO_NO_PROMPT = Turns(
    "### Human: ", "\n### Assistant: ", "cut", end="eos", between="\n", images_first=False,
    verbatim=True,
)  # fmt: skip
GUANACO = dataclasses.replace(GUANACO_NO_PROMPT, system=GUANACO_SYSTEM)
# Its data.py before Clever Flamingo v2, and the demo of version 1.
GUANACO_EOC = dataclasses.replace(GUANACO, image_end=True)


def otter_chat(record: Record) -> list[Segment]:
    """Lay out ``<image>User: {q} GPT:<answer> {a}<|endofchunk|>``, every answer a target.

    <eos> closes the last turn, a target too. Images stand before the ``User:`` of their turn, so
    in-context examples are earlier turns with images of their own. A system message is a line
    before the first turn. Raises BadSample ``empty_answer`` and ``image_mismatch``.
    """
    return _chat(record, OTTER)


def otter_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``otter_chat``, up to <answer>; no targets."""
    return _prompt(record, OTTER)


def otter_tight_chat(record: Record) -> list[Segment]:
    """Lay out ``otter_chat`` without spaces: ``<image>User:{q} GPT:<answer>{a}<|endofchunk|>``."""
    return _chat(record, OTTER_TIGHT)


def otter_tight_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``otter_tight_chat``, no targets."""
    return _prompt(record, OTTER_TIGHT)


def open_flamingo_caption_chat(record: Record) -> list[Segment]:
    r"""Lay out ``<image>Output:{a}<|endofchunk|>``, few-shot examples joined by ``\n``.

    The words of the questions are left out: a record that asks for a caption in its own words can
    be used as it is. Answers and their <|endofchunk|> are targets.
    """
    return _chat(record, CAPTION)


def open_flamingo_caption_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``open_flamingo_caption_chat``, no targets."""
    return _prompt(record, CAPTION)


def open_flamingo_vqa_chat(record: Record) -> list[Segment]:
    r"""Lay out ``<image>Question:{q} Short answer:{a}<|endofchunk|>``; joined by ``\n``."""
    return _chat(record, VQA)


def open_flamingo_vqa_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``open_flamingo_vqa_chat``, no targets."""
    return _prompt(record, VQA)


def open_flamingo_class_chat(record: Record) -> list[Segment]:
    """Lay out ``<image>{q}{a}<|endofchunk|>``, nothing between examples: Hateful Memes' form."""
    return _chat(record, CLASS)


def open_flamingo_class_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``open_flamingo_class_chat``, no targets."""
    return _prompt(record, CLASS)


def guanaco_chat(record: Record) -> list[Segment]:
    r"""Lay out a system line, then ``### Human: {q}\n### Assistant: {a}`` <eos>, as instruct does.

    Turns are joined by ``\n``; images stand where they are marked inside the question, or begin the
    first one, and white space is kept as it is written. A system message of the record takes the
    place of the line. Answers and their <eos> are targets.
    """
    return _chat(record, GUANACO)


def guanaco_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``guanaco_chat``, no targets."""
    return _prompt(record, GUANACO)


def guanaco_no_prompt_chat(record: Record) -> list[Segment]:
    """Lay out ``guanaco_chat`` without the system line (the peer's ``guanaco-no-prompt``)."""
    return _chat(record, GUANACO_NO_PROMPT)


def guanaco_no_prompt_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``guanaco_no_prompt_chat``, no targets."""
    return _prompt(record, GUANACO_NO_PROMPT)


def guanaco_eoc_chat(record: Record) -> list[Segment]:
    """Lay out ``guanaco_chat`` with <|endofchunk|> behind every image: Clever Flamingo's version 1.

    Text looks at the image that follows it there: ``processor.attend_mode`` is ``next``.
    """
    return _chat(record, GUANACO_EOC)


def guanaco_eoc_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``guanaco_eoc_chat``, no targets."""
    return _prompt(record, GUANACO_EOC)


def laion_caption(record: Record) -> list[Segment]:
    """Lay out an image and its caption for pretraining: ``<image>{caption}<|endofchunk|>`` <eos>.

    Everything but ``<image>`` is a target. The caption is the last assistant turn, other turns are
    left out.
    """
    need_answer(record)
    front, turns = place_images(record, record.messages)
    images = [*front, *(s for parts in turns for s in parts if s.kind == "image")]
    caption = answer(record, record.messages[-1], True, end="eoc")
    return [_BOS, *images, *caption, Segment("special", "eos", True)]


def interleaved(record: Record) -> list[Segment]:
    """Lay out a document with images inside for pretraining, as OpenFlamingo does MMC4's.

    Before every ``<image>`` but the first stands the <|endofchunk|> that closes the text of the one
    before; at the end another, and <eos>. Targets are the texts behind images and their
    <|endofchunk|>: neither what stands before the first image nor the <eos>. Behind an image
    without a text the peer trains the <|endofchunk|> alone, here nothing. Turns are joined by a
    space; white space that touches a mark is dropped. Raises BadSample ``image_mismatch`` and,
    where no text follows the last image, ``empty_answer``.
    """
    name, total = name_record(record), len(record.images)
    text = " ".join(m.text for m in record.messages)
    if not text.count(IMAGE_MARK):
        text = IMAGE_MARK * total + text
    first, *pieces = (piece.strip() for piece in text.split(IMAGE_MARK))
    if len(pieces) != total or not total:
        raise BadSample(
            "image_mismatch",
            f"{name}: {len(pieces)} {IMAGE_MARK} mark(s) for {total} image(s); an interleaved "
            "document needs an image, and one mark for each of them",
        )
    if not pieces[-1]:
        raise BadSample("empty_answer", f"{name}: no text follows the last {IMAGE_MARK}")
    segments = [_BOS] + [Segment("text", first)] * bool(first)
    for index, piece in enumerate(pieces):
        segments.append(Segment("image", index))
        segments += [Segment("text", piece, True)] * bool(piece)
        segments.append(Segment("special", "eoc", bool(piece)))
    return [*segments, Segment("special", "eos")]


TEMPLATES = (
    *(otter_chat, otter_prompt, otter_tight_chat, otter_tight_prompt),
    *(open_flamingo_caption_chat, open_flamingo_caption_prompt),
    *(open_flamingo_vqa_chat, open_flamingo_vqa_prompt),
    *(open_flamingo_class_chat, open_flamingo_class_prompt),
    *(guanaco_chat, guanaco_prompt, guanaco_no_prompt_chat, guanaco_no_prompt_prompt),
    *(guanaco_eoc_chat, guanaco_eoc_prompt),
    *(laion_caption, interleaved),
)


def _chat(record: Record, words: Turns) -> list[Segment]:
    """Write a whole conversation out, every answer a target."""
    need_answer(record)
    segments = _dialogue(record, record.messages, words, supervised=True)
    return [*segments, *[Segment("special", "eos", True)] * words.close]


def _prompt(record: Record, words: Turns) -> list[Segment]:
    """Write out what stands before the last answer."""
    return _dialogue(record, messages_before_answer(record), words, supervised=False)


def _dialogue(
    record: Record, messages: tuple[Message, ...], words: Turns, supervised: bool
) -> list[Segment]:
    """Write messages out in a format; a last user turn ends where its answer begins."""
    opening, turns = place_images(record, messages, verbatim=words.verbatim)
    segments = [_BOS]
    if words.system and messages[0].role != "system":
        segments.append(Segment("text", f"{words.system}\n"))
    asked = False
    for message, parts in zip(messages, turns, strict=True):
        if message.role == "system":
            segments += [*parts, Segment("text", "\n")]
        elif message.role == "user":
            segments += [Segment("text", words.between)] * (asked and bool(words.between))
            segments += _question([*opening, *parts], words)
            opening, asked = [], True
        else:
            how = dict(space=words.space, end=words.end, strip=not words.verbatim)
            segments += answer(record, message, supervised, **how)
    return join_text(segments)


def _question(parts: list[Segment], words: Turns) -> list[Segment]:
    """Write a user's turn out: its images, its words, and what asks for the answer."""
    count = next((i for i, part in enumerate(parts) if part.kind != "image"), len(parts))
    images, said = parts[:count], parts[count:]
    if not words.ask:
        images, said = [part for part in parts if part.kind == "image"], []
    if words.images_first:
        if said and images:  # the space behind a mark separates it from the question
            said = [Segment("text", str(said[0].value).lstrip()), *said[1:]]
        turn = [*images, Segment("text", words.question), *said]
    else:
        turn = [Segment("text", words.question), *images, *said]
    if words.image_end:
        end = Segment("special", "eoc")
        turn = [s for part in turn for s in ((part, end) if part.kind == "image" else (part,))]
    turn += [Segment("text", words.prompt)] * bool(words.prompt)
    return turn + [Segment("special", words.before_answer)] * bool(words.before_answer)
