"""MMMU's rules for answers: which option was chosen, and what an open answer says.

Those of MMMU-Benchmark's eval_utils.py, which Bunny took over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from string import ascii_uppercase as LETTERS

from mmjax.types import BadSample

_STRIPPED = ",.!?;:'"  # each in its turn, and once: "B'." loses both, "B.'" only the last
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_EXPONENT = r"[eE][+-]?\d+"
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(rf"-?\d+(?:\.\d+)?{_EXPONENT}"),
    re.compile(rf"-?(?:\d*\.\d+|\d+\b)(?!{_EXPONENT}|[,\d])"),
)


def read_option(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the chosen option; None where there is none.

    The last letter in brackets; else the last that spaces enclose, so that ``A man`` is A; else, in
    an answer of more than five words, the option whose text stands last in it.
    """
    for mark in _STRIPPED:
        text = text.strip(mark)
    text, letters = f" {text} ", LETTERS[: len(choices)]
    for form in ("({})", " {} "):
        last = max(letters, key=lambda letter: text.rfind(form.format(letter)))
        if form.format(last) in text:
            return last
    text = text.lower()
    places = [text.rfind(choice.lower()) for choice in choices]
    if len(text.split()) > 5 and max(places) >= 0:
        return letters[places.index(max(places))]
    return None


def guess_option(text: str, choices: Sequence[str]) -> str:
    """Return ``read_option``, or where it is None a letter drawn by the answer and the options.

    The publisher draws from one stream over all answers, so its numbers differ from order to order;
    here the same answer to the same question is always the same letter.
    """
    read = read_option(text, choices)
    if read is not None:
        return read
    digest = hashlib.sha256("\0".join([text, *choices]).encode("utf-8", "backslashreplace"))
    return LETTERS[int.from_bytes(digest.digest()[:8], "big") % len(choices)]


def read_open(text: str) -> list[str | float]:
    """Return what an open answer says: its key phrases and every number in them.

    The key phrase of a line is the shortest text behind one of a few words (``is``, ``answer``,
    ``=`` in the last line ...); without any, the whole answer is one. Lines alone part an answer:
    the publisher means to part sentences too, but looks for their capitals in small letters.
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for i, line in enumerate(lines):
        tail = ""
        for key in _KEYS + ("=",) * (i == len(lines) - 1):
            if key in line:
                found = line.rpartition(key)[2].strip()
                tail = found if not tail or len(found) < len(tail) else tail
        if tail and tail not in list(_STRIPPED):
            phrases.append(tail)
    phrases = phrases or [text]
    numbers = [n for phrase in phrases for form in _NUMBERS for n in form.findall(phrase)]
    return list(dict.fromkeys(one for said in phrases + numbers for one in _normal(said)))


def mmmu(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Return 1 for the right option, or an open answer that says the right thing.

    Open: a right number, both rounded to two decimals, or a right text within a key phrase. An
    answer that chooses no option is wrong. Raises BadSample where no answer is an option.
    """
    if choices:
        return float(read_option(prediction, choices) == _right(answers, choices))
    return _open(prediction, answers)


def mmmu_guess(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score as ``mmmu``, guessing an option where none is chosen, as the published numbers do."""
    if choices:
        return float(guess_option(prediction, choices) == _right(answers, choices))
    return _open(prediction, answers)


def show_read(text: str, choices: Sequence[str], guess: bool = False) -> str | None:
    """Return what is made of an answer before it is judged: a letter, or all that it says."""
    if choices:
        return guess_option(text, choices) if guess else read_option(text, choices)
    return "; ".join(map(str, read_open(text)))


def _open(prediction: str, answers: Sequence[str]) -> float:
    right = [one for answer in answers for one in _normal(answer)]
    texts = [one for one in right if isinstance(one, str)]
    said = read_open(prediction)
    return float(
        any(
            any(text in one for text in texts) if isinstance(one, str) else one in right
            for one in said
        )
    )


def _normal(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, or the text in small letters.

    A single letter counts only beside a space: nearly every text holds it.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _right(answers: Sequence[str], choices: Sequence[str]) -> str:
    letter = answers[0].strip("() ")
    if letter not in list(LETTERS[: len(choices)]):
        raise BadSample(
            "no_option", f"the right answer is {answers[0]!r}, none of {len(choices)} options"
        )
    return letter
