"""Ask some questions of a task and judge the answers: what each line of the predictions says."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from mmjax.data.resizing import at_resolution
from mmjax.evals.cuts import get_cut
from mmjax.evals.few_shot import Demonstrations
from mmjax.evals.ranking import Ranked, rank, ranked
from mmjax.evals.results import facts_of, judge
from mmjax.evals.tasks import Task, ask, options_of
from mmjax.types import BadSample, MMJaxError, Record

Generate = Callable[[Sequence[Record], int | None, int], list[str | BadSample]]
"""generate(records, resolution, max_new_tokens) -> one answer a record, in their order, or why
there is none. Tasks with ``rank`` call its method ``rank(records, options, resolution, mean=)``,
which returns the log-likelihoods of each record's options, or why there are none."""


def ask_batch(
    task: Task,
    source: Sequence[Record],
    batch: Sequence[int],
    resolution: int | None,
    generate_fn: Generate,
    demos: Demonstrations | None,
) -> list[dict[str, Any]]:
    """Ask some questions and score the answers; a record that cannot be used counts as wrong."""
    rows: dict[int, dict[str, Any]] = {}
    records: dict[int, Record] = {}
    asked: list[list[Record]] = []  # more than one of a record: its examples in several orders
    for index in batch:
        record = None
        try:
            record = source[index]
            rows[index] = _row(task, index, record, resolution)
            if task.rank is not None:
                options_of(task, record)
            laid = [ask(task, record)]
            if demos is not None:
                laid = demos.in_orders(laid[0], index, task.orders or 1)
                rows[index]["examples"] = laid[0].meta["examples"]
        except MMJaxError as e:  # unreadable, or without a question, or an answer to score with
            if index not in rows:
                meta = getattr(e, "meta", {}) if record is None else record.meta
                rows[index] = _row(task, index, None, resolution)
                rows[index]["id"] = str(meta.get("id", index))
            rows[index]["error"] = str(e)
            continue
        records[index] = record
        asked.append([_at_resolution(x, resolution) for x in laid] if task.enlarge else laid)
    # Also of none: where another process has some, both have to notice.
    if task.rank is None:
        texts = generate_fn([one for [one] in asked], resolution, task.max_new_tokens)
    else:
        texts = rank(task, list(records.values()), asked, resolution, generate_fn)
    if len(texts) != len(asked):
        raise MMJaxError(f"generate_fn gave {len(texts)} answers to {len(asked)} questions")
    for (index, record), text in zip(records.items(), texts, strict=True):
        if isinstance(text, BadSample):
            rows[index]["error"] = str(text)
            continue
        if isinstance(text, Ranked):
            rows[index] |= ranked(task, record, text)
            text = text.text
        rows[index]["prediction"] = kept = text if task.cut is None else get_cut(task.cut)(text)
        if kept != text:
            rows[index]["generated"] = text
        try:
            rows[index] |= judge(task, kept, record)
        except MMJaxError as e:
            rows[index]["error"] = str(e)
    return [rows[i] for i in batch]


def _at_resolution(record: Record, resolution: int | None) -> Record:
    """Bring pictures to a size, up or down; one that cannot be read fails where it is encoded."""
    try:
        return at_resolution(record, resolution, enlarge=True)
    except BadSample:
        return record


def _row(task: Task, index: int, record: Record | None, resolution: int | None) -> dict[str, Any]:
    """Begin a line of the predictions file."""
    row: dict[str, Any] = {"id": str(index), "index": index, "task": task.name}
    row |= {"resolution": resolution, "key": task.result_key(resolution)}
    if record is not None:
        row |= {"id": str(record.meta.get("id", index))} | facts_of(task, record)
        if record.images and isinstance(record.images[0], str | os.PathLike):
            row["image"] = os.fspath(record.images[0])
    return row | {"prediction": "", "score": 0.0, "correct": False}
