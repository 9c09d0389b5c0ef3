"""Relaxed accuracy, the score of ChartQA: a number may be off by 5 %."""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 0.05
"""Of the right number, either way."""


def relaxed_accuracy(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Return 1 for a number within 5 % of the right one, or a text that is equal but for its case.

    ``12%`` is 0.12, and no 12; ``1,200`` and ``12 km`` are texts. So is everything where the right
    answer is 0 (Masry et al. 2022, section 5.1, as Pix2Struct, Qwen-VL and lmms-eval compute it).
    """
    return float(any(_near(prediction.strip(), answer.strip()) for answer in answers))


def _near(said: str, right: str) -> bool:
    one, other = _number(said), _number(right)
    if one is None or not other:
        return said.lower() == right.lower()
    return abs(one - other) / abs(other) <= TOLERANCE  # as they round it: 13.395 is not near 14.1


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
