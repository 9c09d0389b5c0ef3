"""report.html: one file that shows a run, to be opened from anywhere."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmjax.evals.charts import Point, Series, legend, line_chart
from mmjax.evals.page import filters, page
from mmjax.evals.pictures import data_uri
from mmjax.evals.predictions import predictions_path, read_predictions
from mmjax.evals.report_tables import asked_section, metrics_section, place
from mmjax.evals.results import (
    read_results,
    right_of,
    write_atomic,
)
from mmjax.monitor.writers import read_metrics

_LOSS_POINTS = 160  # points of the loss curve: more than a screen can tell apart


def report_workdir(workdir: str | os.PathLike, meta: Mapping[str, Any] | None = None) -> str:
    """Write ``report.html`` from what a workdir holds; returns its path.

    meta: facts for the header, such as name, config, checkpoint, step.
    """
    workdir = os.fspath(workdir)
    results = read_results(os.path.join(workdir, "results.json"))
    predictions = []
    for task in results:
        path = predictions_path(workdir, task)
        predictions += read_predictions(path) if os.path.exists(path) else []
    metrics = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    facts = {"name": os.path.basename(os.path.abspath(workdir)), **(meta or {})}
    facts = _of_all(results, facts)
    path = os.path.join(workdir, "report.html")
    return write_report(path, results, predictions, metrics, facts)


def _of_all(results: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a header, of one checkpoint where every result is that one's.

    A workdir keeps the results of tasks that were asked earlier, maybe of another checkpoint.
    """
    told = ("checkpoint", "step")
    every = [e for entries in results.values() for e in entries.values()]
    if len({tuple(e.get(k) for k in told) for e in [*every, facts] if "checkpoint" in e}) < 2:
        return dict(facts)
    kept = {k: v for k, v in facts.items() if k not in (*told, "parameters")}
    return {**kept, "checkpoint": "several, named with each task below"}


def write_report(
    path: str | os.PathLike,
    results: Mapping[str, Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]] = (),
    metrics: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> str:
    """Write a self-contained HTML page; returns its path.

    results: as in results.json. predictions: rows of the predictions files; those with
    ``pictures`` (relative to the page's folder) are shown. metrics: name -> [(step, value)].
    """
    path, meta = os.fspath(path), dict(meta or {})
    name = str(meta.pop("name", "mmjax run"))
    charts = [*_resolution_charts(results), *_loss_chart(metrics or {})]
    body = [
        _tiles(results),
        f"<section><h2>Accuracy</h2>{_table(results)}</section>",
        *(metrics_section(task, entries) for task, entries in results.items()),
        asked_section(results),
        f'<div class="charts">{"".join(charts)}</div>' if charts else "",
        _gallery(predictions, os.path.dirname(os.path.abspath(path))),
    ]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    facts = {**meta, "date": meta.get("date", now)}
    entries = "".join(
        f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items()
    )
    header = f'<h1>{escape(name)}</h1><dl class="meta">{entries}</dl>'
    html = page(f"{name} - report", header, "\n".join(filter(None, body)), escape(_versions()))
    write_atomic(path, html)
    return path


def _tiles(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Show each task's best-resolved accuracy large."""
    tiles = []
    for task, entries in list(results.items())[:4]:
        ordered = sorted(entries.items(), key=lambda kv: kv[1].get("longest_side") or 0)
        shown = [ordered[-1], ordered[0]] if len(ordered) > 1 else ordered
        for key, e in shown:
            where = f"{place(key, e)}, {e['n']:,} questions"
            tiles.append(
                f'<div class="tile"><b>{e["accuracy"]:.1%}</b>'
                f"<span><strong>{escape(task)}</strong><br>{escape(where)}</span></div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    if not results:
        return "<p>Nothing has been evaluated yet.</p>"
    blind = any("blind" in e for entries in results.values() for e in entries.values())
    heads = ["task", "at", "accuracy", "95 % interval", "correct"]
    heads += ["question only", "majority"] if blind else []
    heads += ["chance"]
    cells = "".join(
        f'<th scope="col"{" class=l" if i == 1 else ""}>{escape(h)}</th>'
        for i, h in enumerate(heads)
    )
    rows = []
    for task, entries in results.items():
        for key, e in entries.items():
            rows.append(_table_row(task, place(key, e), e, e.get("blind", {}), blind, ""))
            if len(e.get("groups", {})) > 1:
                for group, found in e["groups"].items():
                    part = {k: b["groups"].get(group, {}) for k, b in e.get("blind", {}).items()}
                    rows.append(_table_row(group, "", found, part, blind, "group"))
    note = (
        '<p class="note">Question only: the most frequent training answer to the same question, '
        "the picture unseen. Majority: always the most frequent training answer.</p>"
    )
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    region = 'class="scroll" tabindex="0" role="region" aria-label="Accuracy table"'
    return f"<div {region}>{table}</div>{note if blind else ''}"


def _table_row(name: str, at: str, e: Mapping, blind: Mapping, with_blind: bool, css: str) -> str:
    def share(value: float | None) -> str:
        return "&ndash;" if value is None else f"{value:.1%}"

    low, high = e.get("ci95", (None, None))
    interval = "&ndash;" if low is None else f"{low * 100:.1f} to {high * 100:.1f}"
    bar = f'<span class="meter" aria-hidden="true"><i style="width:{e["accuracy"]:.1%}"></i></span>'
    cells = [f'<td class="l">{escape(at)}</td>']
    cells += [f'<td class="main">{share(e["accuracy"])}{bar}</td>', f"<td>{interval}</td>"]
    cells.append(f"<td>{right_of(e)}</td>")
    if with_blind:
        for kind in ("question_only", "majority"):
            cells.append(f"<td>{share(blind.get(kind, {}).get('accuracy'))}</td>")
    cells.append(f"<td>{share(e.get('chance'))}</td>")
    head = f'<th scope="row">{escape(name)}</th>'
    return f'<tr class="{css}">{head}{"".join(cells)}</tr>'


def _resolution_charts(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Draw accuracy over resolution for the tasks that were swept."""
    series, ticks, chances = [], {}, {}
    for task, entries in results.items():
        swept = [(k, e) for k, e in entries.items() if e.get("longest_side")]
        if len(swept) < 2:
            continue
        points = []
        for key, e in sorted(swept, key=lambda kv: kv[1]["longest_side"]):
            side, share = e["longest_side"], e["accuracy"]
            low, high = e.get("ci95", (share, share))
            tip = f"{task}, {place(key, e)}\n{share:.1%} of {e['n']:,} ({low:.1%} to {high:.1%})"
            points.append(Point(side, share, tip, f"{share:.0%}", low, high))
            ticks[side] = f"{side}"
            if e.get("chance") is not None:
                chances.setdefault(round(e["chance"], 4), task)
        series.append(Series(task, points))
    if not series:
        return []
    title = "Accuracy over resolution"
    chart = line_chart(
        series,
        title=f"{title}; the same numbers stand in the table",
        x_label="longest side of the picture, pixels",
        y_label="accuracy",
        y_range=(0.0, 1.0),
        percent=True,
        x_ticks=sorted(ticks.items()),
        references=[(c, _chance_label(c, t, len(chances))) for c, t in chances.items()],
        log_x=True,
    )
    return [f"<section><h2>{title}</h2>{chart}{legend(series)}</section>"]


def _chance_label(chance: float, task: str, count: int) -> str:
    return f"chance {chance:.0%}" + (f" ({task})" if count > 1 else "")


def _loss_chart(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    finite = [(s, v) for s, v in metrics.get("train/loss", ()) if abs(v) < float("inf")]
    if len(finite) < 2:
        return []
    every = -(-len(finite) // _LOSS_POINTS)
    # The mean of each stretch, so that thinning out hides no spike.
    stretches = [finite[i : i + every] for i in range(0, len(finite), every)]
    points = []
    for part in stretches:
        mean = sum(v for _, v in part) / len(part)
        points.append(Point(part[-1][0], mean, f"step {part[-1][0]:,}\nloss {mean:.4g}"))
    chart = line_chart(
        [Series("training loss", points, marks=False)],
        title=f"Training loss, from {points[0].y:.3g} to {points[-1].y:.3g}",
        x_label="step",
        y_label="loss per target token",
    )
    return [f"<section><h2>Training loss</h2>{chart}</section>"]


def _gallery(predictions: Sequence[Mapping[str, Any]], folder: str) -> str:
    """Show the pictures with question, answer and prediction, at the resolution of the question."""
    cards, tasks, places = [], {}, {}
    order = {task: i for i, task in enumerate(dict.fromkeys(r["task"] for r in predictions))}
    shown = [r for r in predictions if r.get("pictures")]
    # The same picture at its resolutions stands side by side, the sharpest first.
    shown.sort(key=lambda r: (order[r["task"]], r["index"], -(r["resolution"] or 1 << 30)))
    for row in shown:
        found = [data_uri(os.path.join(folder, x), row.get("resolution")) for x in row["pictures"]]
        if pictures := [one for one in found if one is not None]:
            cards.append(_card(row, pictures))
            tasks[row["task"]] = row["task"]
            places[row["key"]] = _resolution_label(row)
    if not cards:
        return ""
    verdicts = [("", "all"), ("right", "\u2713 right"), ("wrong", "\u2717 wrong")]
    groups: dict[str, Any] = {"verdict": ("answers", verdicts)}
    for name, title, found in (("at", "resolution", places), ("task", "task", tasks)):
        if len(found) > 1:
            groups[name] = (title, [("", "all"), *found.items()])
    return (
        "<section><h2>Pictures, questions, answers</h2>"
        f'{filters(groups)}<ul class="gallery">{"".join(cards)}</ul>'
        '<p class="note">Each picture as the model was given it. Where there are wrong answers, '
        "about half of the pictures are chosen from them, so that shares here are not accuracies."
        "</p></section>"
    )


def _resolution_label(row: Mapping[str, Any]) -> str:
    return f"{row['resolution']} px" if row.get("resolution") is not None else str(row["key"])


def _card(row: Mapping[str, Any], pictures: Sequence[tuple[str, int, int]]) -> str:
    verdict = "right" if row["correct"] else "wrong"
    mark = "\u2713 right" if row["correct"] else "\u2717 wrong"
    if row.get("unscored"):
        verdict, mark = "unscored", "not scored"
    frame = ""
    for i, (uri, width, height) in enumerate(pictures, 1):
        which = f", {i} of {len(pictures)}" if len(pictures) > 1 else ""
        alt = f"Picture {row['id']}{which}, {width} by {height} pixels"
        tiny = ' class="tiny"' if max(width, height) <= 160 else ""
        frame += (
            f'<img{tiny} src="{uri}" width="{width}" height="{height}" '
            f'alt="{escape(alt, quote=True)}" loading="lazy">'
        )
    columns = math.ceil(math.sqrt(len(pictures)))
    several = f' style="--columns:{columns}"' if columns > 1 else ""
    said = escape(row["prediction"]) or "<em>nothing</em>"
    data = {"verdict": verdict, "task": row["task"], "at": row["key"]}
    attributes = " ".join(f'data-{k}="{escape(str(v), quote=True)}"' for k, v in data.items())
    return (
        f'<li class="card {verdict}" {attributes}>'
        f'<div class="frame"{several}>{frame}</div>'
        f'<div class="body"><p><span class="where">{escape(_resolution_label(row))}</span>'
        f'<span class="verdict">{mark}</span></p><p>{escape(row["question"])}</p>'
        f"<dl><dt>answer</dt><dd>{escape(row.get('answer', 'not known'))}</dd>"
        f"<dt>predicted</dt><dd>{said}</dd></dl></div></li>"
    )


def _versions() -> str:
    """Name what made the page."""
    found = [f"Python {platform.python_version()}"]
    for package in ("mmjax", "jax", "flax", "numpy", "pillow"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " \u00b7 ".join(found)
