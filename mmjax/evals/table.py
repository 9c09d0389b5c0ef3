"""Results as a table in the terminal, the blind baselines beside them."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mmjax.evals.results import right_of
from mmjax.evals.summaries import metric_rows, show_metric


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """Lay results out for the terminal, the blind baselines beside them."""
    table = Table(box=box.SIMPLE_HEAD, title="Accuracy", title_justify="left", title_style="bold")
    every = [e for entries in results.values() for e in entries.values()]
    more = (("question only", "blind"), ("chance", "chance"))
    more = [title for title, key in more if any(key in e for e in every)]
    for name in ("task", "at", "accuracy", "95 %", "correct", *more):
        left = name in ("task", "at")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for task, entries in results.items():
        for key, e in entries.items():
            groups = e.get("groups", {})
            name = Text(task, style="bold")
            _add_row(table, name, key, e, e.get("blind", {}), e.get("chance"))
            if len(groups) > 1:
                for group, found in groups.items():
                    blind = {
                        name: b["groups"].get(group, {}) for name, b in e.get("blind", {}).items()
                    }
                    _add_row(table, Text(f"  {group}", style="dim"), "", found, blind, None)
    return table


def metric_tables(results: dict[str, dict[str, Any]]) -> list[Table]:
    """Lay out what summaries found, a table a task, its groups below the whole."""
    tables = []
    for task, entries in results.items():
        names, lines = metric_rows(entries)
        if not lines:
            continue
        table = Table(box=box.SIMPLE_HEAD, title=Text(task, style="bold"), title_justify="left")
        for name in ("at", "of", *names):
            left = name in ("at", "of")
            table.add_column(Text(name), justify="left" if left else "right", overflow="fold")
        for at, group, metrics in lines:
            cells = [show_metric(metrics[name]) if name in metrics else "" for name in names]
            table.add_row("" if group else at, Text(group or "all"), *cells)
        tables.append(table)
    return tables


def _add_row(
    table: Table, name: Text, key: str, e: dict, blind: dict, chance: float | None
) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    low, high = e["ci95"]
    more = {
        "question only": share(blind.get("question_only", {}).get("accuracy")),
        "chance": share(chance),
    }
    table.add_row(
        name,
        key,
        f"[bold]{share(e['accuracy'])}[/]",
        f"{low * 100:.1f}-{high * 100:.1f}",
        right_of(e),
        *(more[column.header] for column in table.columns if column.header in more),
    )
