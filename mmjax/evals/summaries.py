"""Summaries: numbers over many questions of a task, beside the accuracy of each.

A scorer judges one answer; a summary is a pure function of all rows of a result, and of those of
each of its groups: F1, accuracy over pairs of questions, sums of scores. A row has ``prediction``
(after cutting), ``answer``, ``answers``, ``score``, ``group``, ``unit`` (questions of one unit are
judged together) and ``read``: what the scorer made of the prediction, None where nothing. Of a task
with ``rank`` and ``options`` also those, and ``likelihoods`` (of many options the likeliest).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data.benchmarks.mme import COGNITION, PERCEPTION
from mmjax.data.benchmarks.mmmu import DISCIPLINES, SUBJECTS
from mmjax.data.benchmarks.seedbench import VIDEO
from mmjax.evals import cider
from mmjax.types import MMJaxError, nearest

Row = Mapping[str, Any]
Metrics = dict[str, dict[str, float]]
"""Name -> ``value`` and ``of``, the highest it can be: 1 of a share, 200 of an MME subtask. A
number without such a limit has no ``of``."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """How rows become metrics.

    names: the metrics of the whole result. over: rows -> metrics, for the whole and each group.
    combine: group -> its metrics, to further metrics of the whole. whole: rows -> metrics of the
    whole alone. check: raises MMJaxError where something it needs is not installed.
    """

    names: tuple[str, ...]
    over: Callable[[Sequence[Row]], Metrics] = lambda rows: {}
    combine: Callable[[Mapping[str, Metrics]], Metrics] = lambda groups: {}
    whole: Callable[[Sequence[Row]], Metrics] = lambda rows: {}
    check: Callable[[], None] = lambda: None

    def of(self, rows: Sequence[Row]) -> tuple[Metrics, dict[str, Metrics]]:
        """Return the metrics of all rows, and those of each group that has any."""
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.get("group") is not None:
                groups.setdefault(str(row["group"]), []).append(row)
        each = {name: self.over(some) for name, some in sorted(groups.items())}
        of_all = self.over(rows) | self.combine(each) | self.whole(rows)
        return of_all, {name: metrics for name, metrics in each.items() if metrics}


def share(part: float, whole: float) -> dict[str, float]:
    """Return part / whole as a metric; 0 of nothing."""
    return {"value": round(part / whole, 6) if whole else 0.0, "of": 1}


def show_metric(metric: Mapping[str, float]) -> str:
    """Write a metric: ``86.0%``, ``1,223.4 of 2,000``, or the number alone."""
    value, best = metric["value"], metric.get("of")
    if best == 1:
        return f"{value:.1%}"
    return f"{value:,.1f}" + (f" of {best:,}" if best else "")


def metric_rows(entries: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[Any]]:
    """Lay out a task's metrics: their names, and (at, group, metrics) for each line.

    entries: of results.json, split or resolution -> result. The group of the whole is "".
    """
    lines = []
    for at, entry in entries.items():
        if "metrics" in entry:
            lines.append((at, "", entry["metrics"]))
            groups = entry.get("groups", {})
            lines += [(at, name, g["metrics"]) for name, g in groups.items() if "metrics" in g]
    # Those of groups come first: a column of sums has one number.
    names = dict.fromkeys(name for _, group, metrics in lines if group for name in metrics)
    return list(names | dict.fromkeys(n for _, _, metrics in lines for n in metrics)), lines


def yes_no(rows: Sequence[Row]) -> Metrics:
    """Return precision, recall and F1 of yes, and the shares of yes and of neither.

    An answer that is neither is no yes: it is missing from precision, and from recall where yes
    was right. Precision and F1 are 0 where nobody says yes.
    """
    said = [r.get("read") for r in rows]
    wanted = [str(r.get("answer", "")).lower() == "yes" for r in rows]
    hits = sum(s == "yes" and w for s, w in zip(said, wanted, strict=True))
    yes = said.count("yes")
    return {
        "precision": share(hits, yes),
        "recall": share(hits, sum(wanted)),
        "F1": share(2 * hits, yes + sum(wanted)),
        "yes": share(yes, len(rows)),
        "neither": share(said.count(None), len(rows)),
    }


def _mean_f1(groups: Mapping[str, Metrics]) -> Metrics:
    return {"mean F1": share(sum(g["F1"]["value"] for g in groups.values()), len(groups))}


def units_right(rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of units all of whose questions are answered rightly.

    A question that could not be read, of whose unit nothing is known, is a unit that is wrong.
    """
    units: dict[Any, bool] = {}
    for i, row in enumerate(rows):
        unit = row.get("unit", i)
        units[unit] = units.get(unit, True) and row["score"] == 1
    return share(sum(units.values()), len(units))


def mme(rows: Sequence[Row]) -> Metrics:
    """Return accuracy and accuracy+: of the questions, and of the pictures, both questions right.

    Their sum in points is a subtask's score. Rules of MME's calculation.py; an answer that is
    neither yes nor no is wrong in both.
    """
    accuracy = share(sum(r["score"] for r in rows), len(rows))
    plus = units_right(rows)
    neither = share(sum(r.get("read") is None for r in rows), len(rows))
    points = {"value": round(100 * (accuracy["value"] + plus["value"]), 4), "of": 200}
    return {"accuracy": accuracy, "accuracy+": plus, "neither": neither, "score": points}


def _mme_sums(groups: Mapping[str, Metrics]) -> Metrics:
    """Sum the subtasks' scores; of a part of them where not all were asked."""
    out = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        scores = [groups[one]["score"] for one in subtasks if one in groups]
        if scores:
            total = sum(score["value"] for score in scores)
            out[name] = {"value": round(total, 4), "of": 200 * len(scores)}
    return out


def circular(rows: Sequence[Row]) -> Metrics:
    """Return the share of questions that are right in every rotation, and as published alone.

    The first is MMBench's number. A question that was asked once has the second only.
    """
    first: dict[Any, Row] = {}
    for i, row in enumerate(rows):
        first.setdefault(row.get("unit", i), row)
    plain = {"plain": share(sum(r["score"] for r in first.values()), len(first))}
    return ({"circular": units_right(rows)} if any("unit" in r for r in rows) else {}) | plain


def gqa(rows: Sequence[Row]) -> Metrics:
    """Return the accuracy of open questions (``query``) and of binary ones, the other types."""
    kinds: dict[str, list[float]] = {"open": [], "binary": []}
    for row in rows:
        if row.get("group") is not None:
            kinds["open" if row["group"] == "query" else "binary"].append(row["score"])
    return {name: share(sum(found), len(found)) for name, found in kinds.items() if found}


def mmmu(rows: Sequence[Row]) -> Metrics:
    """Return the accuracy of MMMU's disciplines, of questions with options and of open ones.

    ``unread`` is the share of the questions with options where none was chosen: the publisher's
    code guesses there.
    """
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(SUBJECTS.get(row.get("group"), ""), []).append(row["score"])
        kinds.setdefault("options" if row.get("choices") else "open", []).append(row["score"])
    unread = [row.get("read") is None for row in rows if row.get("choices")]
    names = (*DISCIPLINES, "options", "open")
    found = {name: share(sum(kinds[name]), len(kinds[name])) for name in names if name in kinds}
    return found | ({"unread": share(sum(unread), len(unread))} if unread else {})


def seedbench(rows: Sequence[Row]) -> Metrics:
    """Return the accuracy of questions about pictures and of those about videos."""
    kinds: dict[str, list[float]] = {"image": [], "video": []}
    for row in rows:
        kinds["video" if row.get("group") in VIDEO else "image"].append(row["score"])
    return {name: share(sum(found), len(found)) for name, found in kinds.items() if found}


def roc_auc(rows: Sequence[Row]) -> Metrics:
    """Return the area under the ROC curve of the last option's probability among all options.

    The chance that a question whose answer is that option has a higher one than another question;
    equal ones count half. A question that could not be asked is below, or above, all others. None
    where all answers are alike.
    """
    found: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        if (answer := row.get("answer")) is None or "options" not in row:
            continue
        wanted = answer == row["options"][-1]
        if "likelihoods" in row:
            each = np.exp(np.array(row["likelihoods"]) - max(row["likelihoods"]))
            found[wanted].append(float(each[-1] / each.sum()))
        else:
            found[wanted].append(-1.0 if wanted else 2.0)
    right, others = found[True], sorted(found[False])
    if not right or not others:
        return {}
    above = np.searchsorted(others, right, "left") + np.searchsorted(others, right, "right")
    return {"ROC AUC": share(float(above.sum()) / 2, len(right) * len(others))}


def top_5(rows: Sequence[Row]) -> Metrics:
    """Return the share of questions whose answer is among the five likeliest options.

    Of equally likely ones the first count. One that could not be asked is wrong.
    """
    right = 0
    for row in rows:
        options, found = row.get("options") or row.get("choices"), row.get("likelihoods")
        if found:
            best = np.argsort(-np.array(found), kind="stable")[:5]
            right += any(options[i] in row.get("answers", [row["answer"]]) for i in best)
    return {"top-5": share(right, len(rows))}


SUMMARIES: dict[str, Summary] = {
    "cider": Summary(("CIDEr",), cider.cider, check=cider.check),
    "circular": Summary(("circular", "plain"), circular),
    "gqa": Summary(("open", "binary"), gqa),
    "mme": Summary(
        ("accuracy", "accuracy+", "neither", "score", "perception", "cognition"), mme, _mme_sums
    ),
    "mmmu": Summary((*DISCIPLINES, "options", "open", "unread"), whole=mmmu),
    "roc_auc": Summary(("ROC AUC",), roc_auc),
    "seedbench": Summary(("image", "video"), whole=seedbench),
    "top_5": Summary(("top-5",), top_5),
    "yes_no": Summary(("precision", "recall", "F1", "yes", "neither", "mean F1"), yes_no, _mean_f1),
}
"""``yes_no``: the mean F1 is that of the groups, which Bunny's tables have for POPE."""


def get_summary(name: str) -> Summary:
    """Return a summary by name; raises MMJaxError with the nearest."""
    if name not in SUMMARIES:
        raise MMJaxError(
            f"unknown summary {name!r}{nearest(name, SUMMARIES)} (there are {', '.join(SUMMARIES)})"
        )
    return SUMMARIES[name]
