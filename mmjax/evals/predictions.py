"""What is kept of a task beside its results: predictions, pictures for the report, submissions."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from mmjax.data.limits import spread
from mmjax.evals.pictures import save_pictures
from mmjax.evals.results import write_atomic
from mmjax.evals.submissions import get_submission
from mmjax.evals.tasks import Task
from mmjax.types import Record


def predictions_path(workdir: str | os.PathLike, task: str) -> str:
    """Return where the predictions of a task are kept."""
    return os.path.join(workdir, "predictions", re.sub(r"[^\w.-]+", "_", task) + ".jsonl")


def read_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read a predictions file, passing over lines that are no JSON."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def save_predictions(
    task: Task, rows: Sequence[dict[str, Any]], source: Sequence[Record], workdir: str
) -> list[str]:
    """Write the predictions of a task, the pictures that the report will show, and submissions.

    Returns the paths of the submissions, one a resolution.
    """
    path = predictions_path(workdir, task.name)
    shown = {}
    for index in _choose_pictures(rows, task.pictures):
        stem = os.path.splitext(os.path.basename(path))[0]
        saved = save_pictures(source[index], os.path.join(workdir, "predictions", stem), index)
        if saved:
            shown[index] = [os.path.relpath(one, workdir) for one in saved]
    lines = []
    for row in rows:
        kept = {"pictures": shown[row["index"]]} if row["index"] in shown else {}
        lines.append(json.dumps(row | kept, ensure_ascii=False, default=str))
    write_atomic(path, "\n".join(lines) + "\n")
    if task.submission is None:
        return []
    ending, make = get_submission(task.submission)
    written = []
    for key in dict.fromkeys(row["key"] for row in rows):
        written.append(path.removesuffix(".jsonl") + f".{key}{ending}")
        write_atomic(written[-1], make([row for row in rows if row["key"] == key]))
    return written


def _choose_pictures(rows: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Choose questions to show: half of them answered wrongly at some resolution, if there are."""
    by_index: dict[int, bool] = {}
    for row in rows:
        if "error" not in row:
            by_index[row["index"]] = by_index.get(row["index"], True) and row["correct"]
    wrong = [i for i, right in by_index.items() if not right]
    right = [i for i, good in by_index.items() if good]
    take = min(len(wrong), max(count // 2, count - len(right)))
    picked = [wrong[i] for i in spread(len(wrong), take)]
    picked += [right[i] for i in spread(len(right), count - len(picked))]
    return sorted(picked)
