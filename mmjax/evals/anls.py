"""ANLS, the score of DocVQA and its kin: how near an answer is, letter by letter."""

from __future__ import annotations

from collections.abc import Sequence

_THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Return the nearest answer's normalised Levenshtein similarity, 0 where it is below a half.

    1 - edits / letters of the longer; case and runs of white space do not count (Biten et al. 2019,
    arXiv 1905.13648; the mean over the questions is ANLS). A similarity of exactly a half counts
    in the code of the competition's server, MMF, Qwen-VL and lmms-eval, though not in the paper.
    """
    found = " ".join(prediction.lower().split())
    return max(_similarity(found, " ".join(answer.lower().split())) for answer in answers)


def _similarity(one: str, other: str) -> float:
    longer = max(len(one), len(other))
    distance = edits(one, other) / longer if longer else 0.0
    return 1 - distance if distance <= _THRESHOLD else 0.0


def edits(one: str, other: str) -> int:
    """Return the Levenshtein distance: insertions, deletions and substitutions of a letter."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]
