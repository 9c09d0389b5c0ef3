"""Scorers: pure functions ``score(prediction, answers, choices) -> 0.0 ... 1.0``."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from typing import Literal

from mmjax.evals import mmmu, normalise
from mmjax.evals import yes_no as polar
from mmjax.evals.anls import anls
from mmjax.evals.relaxed import relaxed_accuracy
from mmjax.types import BadSample, MMJaxError, nearest

Scorer = Callable[[str, Sequence[str], Sequence[str]], float]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ChoiceMode = Literal["strict", "option_text", "otter"]


def exact_match(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Return 1 if the prediction equals any answer, both brought into ``normalise.plain`` form."""
    found = normalise.plain(prediction)
    return float(any(found == normalise.plain(a) for a in answers))


def exact_match_strict(
    prediction: str, answers: Sequence[str], choices: Sequence[str] = ()
) -> float:
    """Return 1 if the prediction equals any answer to the letter, white space at the ends aside."""
    return float(prediction.strip() in [a.strip() for a in answers])


def gqa(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Return 1 if the prediction, in small letters and without points at its end, is the answer.

    GQA's eval.py compares texts as they stand; LLaVA and Bunny bring predictions into this form
    before they give them to it. Nothing else is forgiven: ``a dog`` is not ``dog``.
    """
    return float(prediction.strip().rstrip(".").lower() in answers)


def word_f1(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Return the F1 of the words shared with the nearest answer, in ``normalise.plain`` form.

    Precision is the share of the prediction's words that the answer has, recall the other way
    round; a word counts as often as both have it. For captions, of which CIDEr judges all at once.
    """
    found = collections.Counter(normalise.plain(prediction).split())
    best = 0.0
    for answer in answers:
        wanted = collections.Counter(normalise.plain(answer).split())
        total = found.total() + wanted.total()
        best = max(best, 2 * (found & wanted).total() / total if total else 0.0)
    return best


def vqa_accuracy(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Return the VQA accuracy against several (10 in VQAv2) human answers.

    The mean over leaving each human out of min(1, equal answers among the others / 3). Where the
    humans differ, prediction and answers are normalised alike; where all agree, the answer may be
    text that stands in the picture, and the prediction has to equal it as it stands. This is
    vqaEval.py of GT-Vision-Lab/VQA as OpenFlamingo's evaluation carries it; its first version, of
    2015, normalised otherwise. Raises MMJaxError below four answers, where even a perfect one
    fails.
    """
    found, *humans = (normalise.one_line(text) for text in (prediction, *answers))
    if len(set(humans)) > 1:
        found, *humans = (normalise.official(text) for text in (found, *humans))
    return _agreement(found, humans)


def vqa_accuracy_evalai(
    prediction: str, answers: Sequence[str], choices: Sequence[str] = ()
) -> float:
    """Return the VQA accuracy with both sides in the form ``normalise.evalai``, always.

    TextVQA's accuracy as MMF, LLaVA and Bunny compute it. VizWiz's own code normalises what is said
    alone: its human answers are in such a form. Raises MMJaxError below four answers.
    """
    return _agreement(normalise.evalai(prediction), [normalise.evalai(a) for a in answers])


def _agreement(found: str, humans: Sequence[str]) -> float:
    """Return the mean over leaving each human out of min(1, equal answers / 3)."""
    if len(humans) < 4:
        raise MMJaxError(
            f"vqa_accuracy needs several human answers to a question (10 in VQAv2), got "
            f"{len(humans)}: {list(humans)}; score single answers with exact_match"
        )
    equal = [a == found for a in humans]
    total = sum(equal)
    return sum(min(1.0, (total - mine) / 3) for mine in equal) / len(humans)


def parse_choice(
    prediction: str, choices: Sequence[str] = (), mode: ChoiceMode = "strict"
) -> str | None:
    """Read the letter of the chosen option out of an answer; None where there is none.

    strict: the letter stands alone at the start (``B``, ``(b)``, ``B. cat``, ``B: because``) or
        after "answer is" / "answer:". ``A man`` is not the option A, ``A or B`` is no choice.
    option_text: as strict, or else the text of exactly one option after normalisation.
    otter: Otter's benchmark code, to compare with its numbers: "The answer is X", else the first
        of A, B, C, D that the answer contains **anywhere** (so ``A man`` is A), else the first
        option whose text it contains in any case, else the first of a, b, c, d (so ``yeah`` is A).
    """
    if mode == "otter":
        return _parse_otter(prediction, choices)
    letters = LETTERS[: len(choices) or 4]
    letter = _parse_strict(prediction.strip(), letters)
    if letter is None and mode == "option_text":
        wanted = normalise.plain(prediction)
        hits = [i for i, text in enumerate(choices) if normalise.plain(text) == wanted]
        letter = LETTERS[hits[0]] if len(hits) == 1 else None
    return letter


def multiple_choice(
    prediction: str,
    answers: Sequence[str],
    choices: Sequence[str] = (),
    mode: ChoiceMode = "strict",
) -> float:
    """Return 1 if the option chosen by ``parse_choice`` is the right one.

    answers: the letter, or the text of the option (``choices`` must then be given). Raises
    BadSample where no answer is an option: nothing could be right; and where an answer is the
    letter of one and the text of another.
    """
    right = {letter for answer in answers for letter in _answer_letters(answer, choices)}
    if not right:
        raise BadSample(
            "no_option",
            f"none of the right answers {list(answers)} is a letter or a text of the options "
            f"{list(choices)}",
        )
    return float(parse_choice(prediction, choices, mode) in right)


def multiple_choice_text(
    prediction: str, answers: Sequence[str], choices: Sequence[str] = ()
) -> float:
    """Score multiple choice, taking an option's text for its letter as well."""
    return multiple_choice(prediction, answers, choices, "option_text")


def multiple_choice_otter(
    prediction: str, answers: Sequence[str], choices: Sequence[str] = ()
) -> float:
    """Score multiple choice with Otter's lenient parser, letters contained anywhere."""
    return multiple_choice(prediction, answers, choices, "otter")


SCORERS: dict[str, Scorer] = {
    "exact_match": exact_match,
    "exact_match_strict": exact_match_strict,
    "vqa_accuracy": vqa_accuracy,
    "vqa_accuracy_evalai": vqa_accuracy_evalai,
    "gqa": gqa,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "word_f1": word_f1,
    "multiple_choice": multiple_choice,
    "multiple_choice_text": multiple_choice_text,
    "multiple_choice_otter": multiple_choice_otter,
    "mmmu": mmmu.mmmu,
    "mmmu_guess": mmmu.mmmu_guess,
    "yes_no": polar.yes_no,
    "yes_no_pope": polar.yes_no_pope,
    "yes_no_mme": polar.yes_no_mme,
}

READERS: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "multiple_choice": parse_choice,
    "multiple_choice_text": lambda text, choices: parse_choice(text, choices, "option_text"),
    "multiple_choice_otter": lambda text, choices: parse_choice(text, choices, "otter"),
    "mmmu": mmmu.show_read,
    "mmmu_guess": lambda text, choices: mmmu.show_read(text, choices, guess=True),
    "yes_no": lambda text, choices: polar.read_yes_no(text),
    "yes_no_pope": lambda text, choices: polar.read_yes_no_pope(text),
    "yes_no_mme": lambda text, choices: polar.read_yes_no_mme(text),
}
"""What a scorer makes of an answer before it judges it, where that is one of a few words."""


def get_scorer(name: str | Scorer) -> Scorer:
    """Return a scorer by name, or the function itself; raises MMJaxError with the nearest."""
    if callable(name):
        return name
    if name not in SCORERS:
        near = nearest(name, SCORERS)
        raise MMJaxError(f"unknown scorer {name!r}{near} (there are {', '.join(SCORERS)})")
    return SCORERS[name]


def _parse_strict(text: str, letters: str) -> str | None:
    one = f"[{letters}{letters.lower()}]"
    end = r"(?:\s*$|\s*[.):,;\n])"
    answer_is = r"\banswer\s*(?:is|:)\s*:?\s*"
    # Several letters are no choice; the a of "B, a cat" is an article, and that of "B, a or c" not.
    article = r"a\s+(?!(?:and|or)\b)[^\W\d_]"
    several = rf"\(?{one}\)?\s*(?:,|/|and\b|or\b)\s*(?!{article})\(?{one}\b"
    if re.match(several, text) or re.search(answer_is + several, text, re.IGNORECASE):
        return None
    named = re.findall(rf"{answer_is}\(?({one}){end}", text, re.IGNORECASE)
    if named:
        chosen = {letter.upper() for letter in named}
        return chosen.pop() if len(chosen) == 1 else None
    start = re.match(rf"\(?({one}){end}", text)
    return start.group(1).upper() if start else None


def _parse_otter(text: str, choices: Sequence[str]) -> str | None:
    named = re.search(r"The answer is ([A-D])", text)
    if named:
        return named.group(1)
    for letter in "ABCD":
        if letter in text:
            return letter
    upper = text.upper()
    for letter, choice in zip("ABCD", choices, strict=False):
        choice = choice.strip()
        choice = choice[:-1] if choice.endswith((".", ",", "?")) else choice
        if choice and choice.upper() in upper:
            return letter
    return next((letter for letter in "ABCD" if letter in upper), None)


def _answer_letters(answer: str, choices: Sequence[str]) -> set[str]:
    """Return the letters of the options that a right answer names, by letter or by their text."""
    text = answer.strip()
    quoted = {letter for letter, one in zip(LETTERS, choices, strict=False) if one == text}
    bare = text.strip("().").upper()
    named = {bare} if len(bare) == 1 and bare in LETTERS[: len(choices) or 26] else set()
    if quoted and named and quoted != named:
        raise BadSample(
            "ambiguous_option",
            f"the right answer {text!r} is the letter of one option and the text of another in "
            f"{list(choices)}; word the options otherwise, such as 'the letter A'",
        )
    return quoted or named
