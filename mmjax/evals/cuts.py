"""What is cut away from a generated text before it is scored, where a peer's numbers depend on it.

Nothing is, unless a task names a cut: a model that goes on behind its answer is scored as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mmjax.evals import normalise
from mmjax.types import MMJaxError, nearest


def open_flamingo_vqa(text: str) -> str:
    """Keep what stands before the first ``Question``, ``Answer`` or ``Short``, and before ", ".

    postprocess_vqa_generation of OpenFlamingo's evaluation: a model of solved examples goes on with
    a question of its own. An answer with such a word in it is cut short, too.
    """
    return re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0].strip()


def open_flamingo_caption(text: str) -> str:
    """Keep what stands before the first ``Output``, without double quotes, as OpenFlamingo does."""
    return text.split("Output", 1)[0].replace('"', "").strip()


def evalai(text: str) -> str:
    """Keep the words of an answer: without capitals, articles and marks, number words as digits.

    LLaVA and Bunny, whose models answer "Yes", do so before they send an answer to EvalAI: VQA's
    rule compares it as it stands where all humans agree.
    """
    return normalise.evalai(text)


def first_line(text: str) -> str:
    """Keep the first line."""
    return text.strip().split("\n", 1)[0].strip()


CUTS: dict[str, Callable[[str], str]] = {
    f.__name__: f for f in (evalai, first_line, open_flamingo_caption, open_flamingo_vqa)
}


def get_cut(name: str) -> Callable[[str], str]:
    """Return a cut by name; raises MMJaxError with the nearest."""
    if name not in CUTS:
        raise MMJaxError(f"unknown cut {name!r}{nearest(name, CUTS)} (there are {', '.join(CUTS)})")
    return CUTS[name]
