"""Accuracies with what they mean beside them: intervals, groups, blind baselines; kept on disk."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmjax.evals.scorers import LETTERS, READERS, get_scorer
from mmjax.evals.summaries import Summary
from mmjax.evals.tasks import Task, answers_of, choices_of, question_of
from mmjax.types import MMJaxError, Record


def summarise(rows: Sequence[Mapping[str, Any]], summary: Summary | None = None) -> dict[str, Any]:
    """Reduce prediction rows (``score``, ``group``) to accuracy, n, correct, ci95 and groups.

    correct: the sum of scores, fractional where the scorer is. ci95: Wilson's interval. With a
    summary the whole and each group have its ``metrics`` too.
    """
    out = _accuracy([r["score"] for r in rows])
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.get("group") is not None:
            groups.setdefault(str(row["group"]), []).append(row["score"])
    out["groups"] = {name: _accuracy(scores) for name, scores in sorted(groups.items())}
    if summary is not None:
        out["metrics"], each = summary.of(rows)
        for name, metrics in each.items():
            out["groups"][name]["metrics"] = metrics
    return out


def facts_of(task: Task, record: Record) -> dict[str, Any]:
    """Return what a row says of its question before anything is answered.

    One of a test split, whose answers nobody has, is ``unscored``.
    """
    row: dict[str, Any] = {"question": question_of(record)}
    if record.meta.get("unscored"):
        row["unscored"] = True
    else:
        answers = answers_of(record)
        row |= {"answer": answers[0]} | ({"answers": answers} if len(set(answers)) > 1 else {})
    choices = choices_of(record)
    # Of a class for each picture there may be thousands; ``ranked`` names the likeliest of them.
    row |= {"choices": choices} if 0 < len(choices) <= len(LETTERS) else {}
    row |= {"options": list(task.options)} if task.options else {}
    row |= {"group": record.meta[task.group]} if task.group in record.meta else {}
    return row | ({"unit": record.meta["unit"]} if "unit" in record.meta else {})


def judge(task: Task, prediction: str, record: Record) -> dict[str, Any]:
    """Return what a prediction is worth: ``score``, ``correct``, and ``read`` where it is read.

    Raises MMJaxError where nothing could be right.
    """
    choices = choices_of(record)
    out = {"read": READERS[task.scorer](prediction, choices)} if task.scorer in READERS else {}
    if record.meta.get("unscored"):
        return out
    value = get_scorer(task.scorer)(prediction, answers_of(record), choices)
    return out | {"score": value, "correct": value >= 0.5}


def right_of(entry: Mapping[str, Any]) -> str:
    """Say how many answers of a result are right: ``12 / 16, 1 unreadable``.

    Unreadable questions could not be asked and count as wrong.
    """
    right = entry["correct"]
    shown = f"{right:,}" if isinstance(right, int) else f"{right:,.1f}"
    unread = f", {entry['unreadable']:,} unreadable" if entry.get("unreadable") else ""
    return f"{shown} / {entry['n']:,}{unread}"


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share; (0, 1) where nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def blind_baselines(
    task: Task, records: Iterable[Record], train: Iterable[Record]
) -> dict[str, Any]:
    """Score two ways of answering without the picture, learnt from training records.

    majority: always the most frequent answer. question_only: the most frequent answer to the very
    same question, or else the majority. Each like a result: accuracy, n, correct, ci95, groups.
    """
    overall: collections.Counter[str] = collections.Counter()
    by_question: dict[str, collections.Counter[str]] = {}
    for record in train:
        with contextlib.suppress(MMJaxError):  # one without an answer teaches nothing
            answer = answers_of(record)[0]
            overall[answer] += 1
            by_question.setdefault(question_of(record), collections.Counter())[answer] += 1
    if not overall:
        return {}
    majority = overall.most_common(1)[0][0]
    best = {q: c.most_common(1)[0][0] for q, c in by_question.items()}
    rows: dict[str, list[dict[str, Any]]] = {"majority": [], "question_only": []}
    for record in records:
        guesses = {"majority": majority, "question_only": best.get(question_of(record), majority)}
        for name, guess in guesses.items():
            row = {"prediction": guess, "score": 0.0}
            with contextlib.suppress(MMJaxError):  # nothing would be right, nor of the model's own
                row |= facts_of(task, record)
                row |= judge(task, guess, record)
            rows[name].append(row)
    out: dict[str, Any] = {
        name: summarise(scored, task.summariser) for name, scored in rows.items()
    }
    out["majority"]["answer"] = majority
    return out


def chance_level(task: Task, records: Iterable[Record]) -> float | None:
    """Return the accuracy of guessing: as the task says, or one over the options' number.

    Of a task that has open questions too, nothing is guessed of those.
    """
    chosen = task.is_multiple_choice or task.has_open_questions or task.rank is not None
    if task.chance is not None or not chosen:
        return task.chance
    counts = []
    for record in records:
        with contextlib.suppress(MMJaxError):  # it is told where it is asked
            counts.append(len(task.options or choices_of(record)))
    shares = [1 / n if n else 0.0 for n in counts if n or task.has_open_questions]
    return sum(shares) / len(shares) if any(shares) else None


def read_results(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Read a results.json; empty where there is none. Raises MMJaxError naming a broken file."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except ValueError as e:
        raise MMJaxError(f"{path} is no JSON ({e}); move it away and evaluate again") from e
    if not isinstance(found, dict):
        raise MMJaxError(f"{path} holds no results but a {type(found).__name__}; move it away")
    return found


def merge_results(
    path: str | os.PathLike, new: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Add results to a results.json and return all; the file changes at once or not at all.

    The tasks that were evaluated replace what stood under their names; others stay, those too that
    another process adds meanwhile.
    """
    with _alone(os.path.dirname(os.path.abspath(path))):
        merged = read_results(path) | {name: dict(entries) for name, entries in new.items()}
        write_atomic(path, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    return merged


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Make other evaluations that write to a folder wait for the block; not where locks fail."""
    os.makedirs(folder, exist_ok=True)
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks lock no folder
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def write_atomic(path: str | os.PathLike, text: str | bytes) -> None:
    """Write a file so that a reader, or a kill, never sees half of it."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{os.fspath(path)}.{os.getpid()}.partial"  # another process may write it too
    # Half a surrogate pair, which a dataset's JSON may hold, becomes its own escape in JSON.
    data = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _accuracy(scores: Sequence[float]) -> dict[str, Any]:
    n, total = len(scores), float(sum(scores))
    low, high = wilson(total, n)
    correct = int(total) if total.is_integer() else round(total, 4)
    accuracy = round(total / n, 6) if n else 0.0
    return {
        "accuracy": accuracy,
        "n": n,
        "correct": correct,
        "ci95": [round(low, 6), round(high, 6)],
    }
