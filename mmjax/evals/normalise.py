"""Ways to bring an answer into a form that can be compared.

``plain`` is ours; ``official`` reproduces the VQA evaluation code (vqaEval.py of GT-Vision-Lab/VQA,
Antol et al. 2015), with its particularities, and ``evalai`` what peers do to an answer before that,
so that accuracies can be set beside published ones.
"""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = frozenset(("a", "an", "the"))
# A point or comma between digits and a sign before a digit belong to a number.
_PLAIN_PUNCTUATION = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|-(?!\d)|(?<=\w)-|[^\w\s.,-]|_")


def plain(text: str) -> str:
    """Lower the case, drop punctuation and articles, and join words by single spaces.

    Numbers keep their decimal point and sign (``-3.5``); thousands separators go (``1,000``).
    Articles stay where nothing else would be left, so that the option ``A`` remains an answer. A
    letter and its accent are one character, however they were written (Unicode's NFC).
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    words = _PLAIN_PUNCTUATION.sub(_space, text.replace("'", "").replace("\u2019", "")).split()
    kept = [w for w in words if w not in _ARTICLES] or words
    return " ".join(kept) or " ".join(text.split())


def _space(mark: re.Match[str]) -> str:
    """Return a space for punctuation; accents and vowel signs, which ``\\w`` leaves out, stay."""
    return mark[0] if unicodedata.category(mark[0]).startswith("M") else " "


def one_line(text: str) -> str:
    """Replace line ends and tabs by spaces, and drop white space at both ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def official(text: str) -> str:
    """Normalise an answer as the VQA evaluation does: punctuation, digits, articles."""
    return _official_words(_official_punctuation(one_line(text)))


def evalai(text: str) -> str:
    """Bring an answer into the form in which LLaVA and Bunny send it to EvalAI.

    In small letters, without commas and question marks, the s of an apostrophe a word of its own,
    and then as ``official``: MMF's EvalAIAnswerProcessor.
    """
    return official(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def _official_punctuation(text: str) -> str:
    """Remove punctuation as the VQA evaluation does.

    A mark that touches a space, or any mark in a text with a comma between digits, is deleted;
    another becomes a space. Points go unless a digit follows.
    """
    out = text
    number_comma = re.search(r"(\d)(,)(\d)", text) is not None
    for mark in _OFFICIAL_MARKS:
        touches = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if touches or number_comma else " ")
    # The official pattern means to spare decimal points but looks behind wrongly; kept.
    return re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=32)


def _official_words(text: str) -> str:
    """Lower the case, write number words as digits, drop articles, restore apostrophes."""
    words = [_NUMBER_WORDS.get(w, w) for w in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


_OFFICIAL_MARKS = (*';/[]"{}()=+\\_-><@`,?!',)
_NUMBER_WORDS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}

# Contractions that the VQA evaluation writes in full, given without one of their apostrophes.
_FULL_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Map every spelling that lacks one apostrophe to the full form, and a slip of the table."""
    table = {
        full[:i] + full[i + 1 :]: full
        for full in _FULL_FORMS.split()
        for i, letter in enumerate(full)
        if letter == "'"
    }
    return table | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()
