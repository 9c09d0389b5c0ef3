"""Bunny's templates: one dialogue whose end mark is the language model's, and pretraining's.

The strings are those of bunny/conversation.py and bunny/util/data_utils.py, letter by letter: white
space around an answer stays, that around a question which holds an image goes. An image stands at
the front of the message that marks it, with a newline behind it. A special segment named by a
token's own text, such as ``</s>``, is that token.
"""

from __future__ import annotations

from mmjax.data.turns import (
    IMAGE_MARK,
    answer,
    count_marks,
    join_text,
    messages_before_answer,
    name_record,
    need_answer,
)
from mmjax.types import BadSample, Message, Record, Segment

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

ENDS = {
    "bunny": "<|endoftext|>",  # Phi-1.5 and 2, StableLM-2, Qwen1.5
    "bunny_phi3": "<|endoftext|>",
    "bunny_minicpm": "</s>",
    "bunny_llama": "<|end_of_text|>",
    "bunny_gemma": "<eos>",
}
"""The token that ends an answer, by the template's name without ``_chat`` or ``_prompt``."""

_BOS = Segment("special", "bos")


def bunny_chat(record: Record) -> list[Segment]:
    r"""Lay out ``{system} USER: <image>\n{q} ASSISTANT: {a}<|endoftext|>USER: {q} ...``.

    Answers and their <|endoftext|> are targets. A system message of the record takes the place of
    the peer's. A leading answer is left out, as the peer does. Raises BadSample ``empty_answer``,
    ``image_mismatch``, and ``bad_record`` where questions and answers do not alternate.
    """
    return _chat(record, "bunny")


def bunny_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``bunny_chat``, up to ``ASSISTANT:``."""
    return _prompt(record, "bunny")


def bunny_phi3_chat(record: Record) -> list[Segment]:
    """Lay out ``bunny_chat``, as the peer's ``--version phi3`` does: only its masking differs."""
    return _chat(record, "bunny_phi3")


def bunny_phi3_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``bunny_phi3_chat``, no targets."""
    return _prompt(record, "bunny_phi3")


def bunny_minicpm_chat(record: Record) -> list[Segment]:
    """Lay out ``bunny_chat`` with </s> behind each answer."""
    return _chat(record, "bunny_minicpm")


def bunny_minicpm_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``bunny_minicpm_chat``, no targets."""
    return _prompt(record, "bunny_minicpm")


def bunny_llama_chat(record: Record) -> list[Segment]:
    """Lay out ``bunny_chat`` with LLaMA-3's <|end_of_text|> behind each answer."""
    return _chat(record, "bunny_llama")


def bunny_llama_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``bunny_llama_chat``, no targets."""
    return _prompt(record, "bunny_llama")


def bunny_gemma_chat(record: Record) -> list[Segment]:
    """Lay out ``bunny_chat`` with <eos> behind each answer (the peer's branch gemma_temp)."""
    return _chat(record, "bunny_gemma")


def bunny_gemma_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the last answer of ``bunny_gemma_chat``, no targets."""
    return _prompt(record, "bunny_gemma")


def bunny_plain(record: Record) -> list[Segment]:
    r"""Lay out an image and its caption for pretraining: ``<image>{caption}\n``, no end mark.

    Caption and newline are targets; the words of the question are left out. Raises BadSample
    ``image_mismatch`` without an image, ``empty_answer``, and ``bad_record`` for more than one
    answer.
    """
    need_answer(record)
    count_marks(record)
    images = _images(record)
    if sum(m.role == "assistant" for m in record.messages) > 1:
        raise BadSample("bad_record", f"{name_record(record)}: more than one caption")
    caption, _ = answer(record, record.messages[-1], True, strip=False)
    return join_text([_BOS, *images, caption, Segment("text", "\n", True)])


def bunny_plain_prompt(record: Record) -> list[Segment]:
    """Lay out what stands before the caption of ``bunny_plain``: the image, no targets.

    A caption has no end mark: generate as many tokens as are wanted. Raises BadSample
    ``image_mismatch`` without an image.
    """
    count_marks(record)
    return [_BOS, *_images(record)]


TEMPLATES = (
    *(bunny_chat, bunny_prompt, bunny_phi3_chat, bunny_phi3_prompt),
    *(bunny_minicpm_chat, bunny_minicpm_prompt, bunny_llama_chat, bunny_llama_prompt),
    *(bunny_gemma_chat, bunny_gemma_prompt, bunny_plain, bunny_plain_prompt),
)


def _images(record: Record) -> list[Segment]:
    """Return the images that a caption is of."""
    if not record.images:
        raise BadSample("image_mismatch", f"{name_record(record)}: pretraining needs an image")
    return [Segment("image", i) for i in range(len(record.images))]


def _chat(record: Record, name: str) -> list[Segment]:
    """Write a whole conversation out, every answer a target."""
    need_answer(record)
    return _dialogue(record, record.messages, ENDS[name], supervised=True)


def _prompt(record: Record, name: str) -> list[Segment]:
    """Write out what stands before the last answer."""
    return _dialogue(record, messages_before_answer(record), ENDS[name], supervised=False)


def _dialogue(
    record: Record, messages: tuple[Message, ...], end: str, supervised: bool
) -> list[Segment]:
    """Write messages out; a last question ends where its answer begins."""
    unmarked = 0 if count_marks(record) else len(record.images)
    system = SYSTEM
    if messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
    if messages and messages[0].role == "assistant":
        messages = messages[1:]
    wrong = [m.role for m in messages] != (["user", "assistant"] * len(messages))[: len(messages)]
    if wrong or not messages:
        raise BadSample(
            "bad_record",
            f"{name_record(record)}: questions and answers do not alternate "
            f"({', '.join(m.role for m in record.messages)}); mend the record or drop it",
        )
    segments = [_BOS, Segment("text", f"{system} ")]
    shown = 0
    for message in messages:
        if message.role == "assistant":
            segments += answer(record, message, supervised, space=" ", end=end, strip=False)
            continue
        count = message.text.count(IMAGE_MARK) + unmarked
        text = message.text
        if count:
            text = text.replace(IMAGE_MARK, "").strip()
            text = f"\n{text}" * bool(text)
        segments.append(Segment("text", "USER: "))
        segments += [Segment("image", shown + i) for i in range(count)]
        segments.append(Segment("text", f"{text} ASSISTANT:"))
        shown, unmarked = shown + count, 0
    return join_text(segments)
