"""Tables of the report beside that of accuracies: summaries, and how tasks were asked."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from mmjax.evals.summaries import metric_rows, show_metric

_ASKED = {
    "checkpoint": "checkpoint",
    "step": "step",
    "template": "template",
    "source": "source",
    "prompt": "prompt",
    "rank": "options ranked by",
    "options": "options",
    "scorer": "scorer",
    "cut": "cut",
    "max_new_tokens": "new tokens at most",
    "shots": "shots",
    "text_shots": "shots without pictures",
    "rices": "examples like the question by",
    "orders": "orders of the examples",
    "num_beams": "beams",
    "length_penalty": "length penalty",
    "limit": "questions at most",
}


def place(key: str, entry: Mapping[str, Any]) -> str:
    """Say where a result was measured: its split, or its resolution."""
    side = entry.get("longest_side")
    if key == "full":
        return f"full ({side} px)" if side else "full"
    return f"{key} px" if entry.get("resolution") is not None else str(key)


def metrics_section(task: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Show what a task's summary found: the whole, then its groups."""
    names, lines = metric_rows(entries)
    if not lines:
        return ""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for at, group, metrics in lines:
        cells = "".join(
            f"<td>{escape(show_metric(metrics[name])) if name in metrics else ''}</td>"
            for name in names
        )
        head = f'<th scope="row">{escape(group or "all")}</th>'
        where = "" if group else escape(place(at, entries[at]))
        kind = "group" if group else ""
        rows.append(f'<tr class="{kind}">{head}<td class="l">{where}</td>{cells}</tr>')
    table = (
        '<table><thead><tr><th scope="col">of</th><th scope="col" class="l">at</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    label = escape(f"Metrics of {task}", quote=True)
    region = f'class="scroll" tabindex="0" role="region" aria-label="{label}"'
    return f"<section><h2>{escape(task)}</h2><div {region}>{table}</div></section>"


def asked_section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Show how each task was asked, so that its numbers can be understood later."""
    parts = []
    for task, entries in results.items():
        entry = next(iter(entries.values()))
        known = {title: entry[key] for key, title in _ASKED.items() if entry.get(key) is not None}
        if "prompt" in entry:  # results of older versions say nothing
            facts = "".join(
                f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>"
                for k, v in known.items()
            )
            parts.append(f'<h3>{escape(task)}</h3><dl class="meta">{facts}</dl>')
    return f"<section><h2>How it was asked</h2>{''.join(parts)}</section>" if parts else ""
