"""Options ranked by their likelihood behind a prompt, in place of an answer that a model writes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmjax.evals.scorers import LETTERS
from mmjax.evals.tasks import Task, options_of
from mmjax.types import BadSample, MMJaxError, Record

LIKELIEST = 5
"""So many are kept of a thousand options."""


@dataclasses.dataclass(frozen=True)
class Ranked:
    """What stands for an answer: the letter or the text of the likeliest option.

    likelihoods: what was compared, of each option: natural logarithms, by the task's ``rank`` of
    the whole option or a mean over its tokens.
    """

    text: str
    likelihoods: tuple[float, ...]


def rank(
    task: Task,
    records: Sequence[Record],
    asked: Sequence[Sequence[Record]],
    resolution: int | None,
    generate_fn: Callable,
) -> list[Ranked | BadSample]:
    """Rank each record's options, the first of equally likely ones.

    asked: each record as it is laid out, behind its examples, in as many orders of them as the
    task asks for: the mean over these is compared, as in OpenFlamingo's prompt ensembling. Raises
    MMJaxError where generate_fn ranks nothing.
    """
    score = getattr(generate_fn, "rank", None)
    if score is None:
        raise MMJaxError(
            f"task {task.name} has rank {task.rank!r}, and what answers it has no method rank; "
            "leave rank out, or use mmjax.evals.answer.Answerer"
        )
    options = [options_of(task, record) for record in records]
    each = [one for some in asked for one in some]
    texts = [own for own, some in zip(options, asked, strict=True) for _ in some]
    found = iter(score(each, texts, resolution, mean=task.rank == "mean_likelihood"))
    of_each = [list(itertools.islice(found, len(some))) for some in asked]
    return [_mean_best(task, *pair) for pair in zip(options, of_each, strict=True)]


def ranked(task: Task, record: Record, found: Ranked) -> dict[str, Any]:
    """Return what a row of the predictions says of the options: ``likelihoods``, in their order.

    Of a record's own options that are more than the letters, ``options`` are the likeliest alone,
    the first one first, and ``likelihoods`` theirs.
    """
    values = [round(x, 6) for x in found.likelihoods]
    if task.options or len(values) <= len(LETTERS):
        return {"likelihoods": values}
    options = options_of(task, record)
    best = np.argsort(-np.asarray(found.likelihoods), kind="stable")[:LIKELIEST]
    return {"options": [options[i] for i in best], "likelihoods": [values[i] for i in best]}


def _mean_best(task: Task, options: Sequence[str], found: Sequence[Any]) -> Ranked | BadSample:
    """Return the best option by the mean of what was found, or the first reason for none."""
    bad = next((one for one in found if isinstance(one, BadSample)), None)
    return bad or _best(task, options, np.mean(np.asarray(found, np.float64), axis=0))


def _best(task: Task, options: Sequence[str], likelihoods: Any) -> Ranked:
    values = np.asarray(likelihoods, np.float64)
    if not np.isfinite(values).any():
        raise MMJaxError(
            f"task {task.name}: the likelihoods of {list(options)} are no numbers; the model's "
            "weights or its compute dtype are at fault"
        )
    best = int(np.nanargmax(values))
    lettered = task.is_multiple_choice or task.has_open_questions
    own = lettered and not task.options and len(options) <= len(LETTERS)
    return Ranked(LETTERS[best] if own else options[best], tuple(values.tolist()))
