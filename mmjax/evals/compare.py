"""One task of several runs side by side, as a table and a plot.

    python -m mmjax.evals.compare low=runs/low high=runs/high --out docs/resolution.md

RUN is a workdir with a results.json, or name=workdir; the name is by default the folder's. The
table goes between two marks of the Markdown file OUT, whose other text is kept; the plot stands
beside it as an SVG of the same name. Nothing is evaluated here: `python eval.py` does that.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.cli import Parser, run_guarded
from mmjax.evals.charts import Point, Series, line_chart, standalone
from mmjax.evals.page import STYLE
from mmjax.evals.results import read_results, write_atomic
from mmjax.evals.summaries import metric_rows, show_metric
from mmjax.types import MMJaxError

BEGIN = "<!-- written by mmjax.evals.compare: begin -->"
END = "<!-- written by mmjax.evals.compare: end -->"

Entries = Mapping[str, Mapping[str, Any]]
"""One task of a results.json: resolution -> accuracy, n, ci95, longest_side, ..."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table and the plot, and print the table."""
    parser = Parser("mmjax.evals.compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a workdir, or name=workdir")
    parser.add_argument("--task", help="which task of the results; needed where there are several")
    parser.add_argument("--out", required=True, help="the Markdown file, such as docs/compare.md")
    args = parser.read(argv)
    runs = read_runs(args.runs, args.task)
    typed = " \\\n    ".join(["python -m mmjax.evals.compare", *args.runs])
    task = f" --task {args.task}" if args.task else ""
    command = f"{typed} \\\n   {task} --out {args.out}"
    text = write(args.out, runs, command)
    print(text)


def read_runs(names: Sequence[str], task: str | None = None) -> dict[str, Entries]:
    """Return run name -> its results of one task.

    Raises MMJaxError for a run without results, a task that it lacks, or runs that were asked
    otherwise: at other sizes, other questions or examples, scored by other rules.
    """
    runs: dict[str, Entries] = {}
    for item in names:
        name, mark, folder = item.partition("=")
        folder = folder if mark else item
        name = name if mark else Path(folder).resolve().name
        results = read_results(Path(folder, "results.json"))
        if not results:
            raise MMJaxError(
                f"{folder} has no results.json; evaluate it first: python eval.py "
                f"--config=<its recipe> --checkpoint={folder}"
            )
        if task is None and len(results) > 1:
            raise MMJaxError(f"{folder} has several tasks, {', '.join(results)}: give --task")
        chosen = task or next(iter(results))
        if chosen not in results:
            raise MMJaxError(f"{folder} has no task {chosen!r}; it has {', '.join(results)}")
        if name in runs:
            raise MMJaxError(f"two runs are called {name!r}; write other-name={folder}")
        runs[name] = results[chosen]
    first = next(iter(runs))
    for name, entries in runs.items():
        if set(entries) != set(runs[first]):
            raise MMJaxError(
                f"run {name!r} was asked at {', '.join(entries)} and {first!r} at "
                f"{', '.join(runs[first])}; evaluate both with the same resolutions"
            )
        for key, entry in entries.items():
            _check_alike(first, runs[first][key], name, entry)
    return runs


# What has to be alike before two accuracies are. Longest sides are those of the pictures.
_ASKED = ("split", "scorer", "n", "shots", "text_shots", "longest_side")

# The same, in results that say it: those of older versions do not.
_TOLD = ("source", "prompt", "cut", "summary", "max_new_tokens", "num_beams", "length_penalty")

# What results say only where it was so: those without it were asked otherwise.
_SAID = ("rank", "options", "rices", "orders")


def _check_alike(first: str, ours: Mapping[str, Any], name: str, theirs: Mapping[str, Any]) -> None:
    told = [what for what in _TOLD if what in ours and what in theirs]
    for what in (*_ASKED, *_SAID, *told):
        if ours.get(what) != theirs.get(what):
            raise MMJaxError(
                f"{what} is {ours.get(what)} in {first!r} and {theirs.get(what)} in {name!r}; "
                "evaluate both with the same task"
            )


def write(out: str | os.PathLike, runs: Mapping[str, Entries], command: str) -> str:
    """Write the table into ``out`` and the plot beside it; returns what stands between the marks.

    A file that is there keeps its text outside the marks; one without marks gets them at its end.
    """
    out = Path(out)
    if out.is_dir():
        raise MMJaxError(f"--out {out} is a folder; give the Markdown file, {out / 'compare.md'}")
    picture = out.with_suffix(".svg")
    tables = "\n\n".join(filter(None, (table(runs), metric_table(runs))))
    between = f"{tables}\n\n![{_title(runs)}]({picture.name})\n\n```\n{command}\n```"
    block = f"{BEGIN}\n{between}\n{END}"
    old = out.read_text("utf-8") if out.exists() else ""
    found = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", old, re.DOTALL)
    if found:
        new = old[: found.start()] + block + old[found.end() :]
    else:
        new = f"{old.rstrip()}\n\n{block}\n".lstrip()
    write_atomic(picture, plot(runs))
    write_atomic(out, new)
    return between


def table(runs: Mapping[str, Entries]) -> str:
    """Lay accuracies out as a Markdown table, a row a size; the best of each row is bold."""
    lines = [f"| longest side | {' | '.join(runs)} |", f"|---|{'---:|' * len(runs)}"]
    for key in _keys(runs):
        entries = [entries[key] for entries in runs.values()]
        best = max(e["accuracy"] for e in entries)
        cells = []
        for e in entries:
            share = f"{e['accuracy']:.1%}"
            low, high = e["ci95"]
            share = f"**{share}**" if e["accuracy"] == best else share
            cells.append(f"{share} ({low * 100:.1f} to {high * 100:.1f})")
        lines.append(f"| {_size(key, entries[0])} | {' | '.join(cells)} |")
    counts = {e["n"] for entries in runs.values() for e in entries.values()}
    steps = ", ".join(
        f"{name} {max(e['step'] for e in entries.values()):,}"
        for name, entries in runs.items()
        if all("step" in e for e in entries.values())
    )
    note = f"{', '.join(f'{n:,}' for n in sorted(counts))} questions a cell, 95 % intervals."
    note += f" Steps trained: {steps}." if steps else ""
    # Each family has its own; the same model asked in another is not the same.
    templates = {name: next(iter(e.values())).get("template") for name, e in runs.items()}
    if len(set(templates.values())) > 1:
        note += f" Templates: {', '.join(f'{n} {t}' for n, t in templates.items())}."
    return "\n".join([*lines, "", note])


def metric_table(runs: Mapping[str, Entries]) -> str:
    """Lay out what summaries found, a row a metric of the whole or of a group; "" without any."""
    first, cells = next(iter(runs.values())), {}
    for name, entries in runs.items():
        for at, group, metrics in metric_rows(entries)[1]:
            where = [_size(at, first[at])] if len(first) > 1 else []
            for metric, found in metrics.items():
                what = ", ".join([*where, *filter(None, (group,)), metric])
                cells.setdefault(what, {})[name] = show_metric(found)
    if not cells:
        return ""
    lines = [f"| metric | {' | '.join(runs)} |", f"|---|{'---:|' * len(runs)}"]
    for what, by_run in cells.items():
        lines.append(f"| {what} | {' | '.join(by_run.get(name, '') for name in runs)} |")
    return "\n".join(lines)


def plot(runs: Mapping[str, Entries]) -> str:
    """Draw accuracy over size, a line a run, as an SVG file."""
    keys = _keys(runs)
    series, ticks, chances = [], {}, {}
    for name, entries in runs.items():
        points = []
        for place, key in enumerate(keys):
            e = entries[key]
            x = e.get("longest_side") or place + 1
            ticks[x] = _size(key, e)
            low, high = e["ci95"]
            points.append(Point(x, e["accuracy"], f"{name}: {e['accuracy']:.1%}", None, low, high))
            if e.get("chance") is not None:
                chances[round(e["chance"], 4)] = f"chance {e['chance']:.0%}"
        series.append(Series(name, points))
    chart = line_chart(
        series,
        title=_title(runs),
        x_label="longest side of the picture, pixels",
        y_label="accuracy",
        y_range=(0.0, 1.0),
        percent=True,
        x_ticks=sorted(ticks.items()),
        references=list(chances.items()),
        log_x=True,
    )
    return standalone(chart, series, STYLE)


def _keys(runs: Mapping[str, Entries]) -> list[str]:
    """Order the results by size; those without one as they stand in the file."""
    entries = next(iter(runs.values()))
    return sorted(entries, key=lambda key: entries[key].get("longest_side") or 0)


def _size(key: str, entry: Mapping[str, Any]) -> str:
    side = entry.get("longest_side")
    return str(side) if side else key


def _title(runs: Mapping[str, Entries]) -> str:
    return f"Accuracy over resolution: {', '.join(runs)}"


if __name__ == "__main__":
    sys.exit(run_guarded(main))
