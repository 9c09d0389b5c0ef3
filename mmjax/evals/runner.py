"""Run tasks against a model and keep what comes out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from mmjax.data.limits import spread
from mmjax.evals.asking import Generate, ask_batch
from mmjax.evals.benchmarks import source_settings
from mmjax.evals.few_shot import demonstrations
from mmjax.evals.pictures import picture_size
from mmjax.evals.predictions import predictions_path, save_predictions
from mmjax.evals.results import (
    blind_baselines,
    chance_level,
    merge_results,
    summarise,
)
from mmjax.evals.rices import by_likeness
from mmjax.evals.tasks import Task, chosen, open_source
from mmjax.monitor.terminal import track
from mmjax.types import BadSample, MMJaxError, Record


def evaluate(
    tasks: Sequence[Task],
    generate_fn: Generate,
    *,
    workdir: str | os.PathLike | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    step: int | None = None,
    progress: bool = True,
    console: Console | None = None,
    stop: Callable[[], bool] = lambda: False,
    need_some: bool = False,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Ask every question of every task; return task -> split or resolution -> accuracy, n, ...

    workdir: where ``results.json``, ``predictions/<task>.jsonl`` and the report's pictures go;
        None writes nothing (while training, and on every process but the first).
    limit: at most so many questions a task, below the task's own. step: of the checkpoint.
    stop: asked between batches; True ends the evaluation, and the unfinished task is left out.
    need_some: raise MMJaxError where none of a task's questions could be asked or scored: 0 % would
        look like a result. While training such an evaluation must end nothing.
    asked: how generate_fn asks (the template, beams), kept with each result.
    A kill loses the unfinished task alone: files change only when a task is complete. Raises
    MMJaxError where they cannot be written.
    """
    check_names(tasks)
    console = console or Console()
    results: dict[str, dict[str, Any]] = {}
    kept: list[str] = []
    facts = {**(asked or {}), **({} if step is None else {"step": step})}

    def watch(batches: list[list[int]], label: str) -> Iterator[list[int]]:
        total = sum(map(len, batches))
        return track(batches, total, label, size=len, enabled=progress, console=console)

    with _tell_kept(kept, workdir, console):
        for task in tasks:
            done = _run_task(
                task,
                generate_fn,
                batch_size=batch_size,
                limit=limit,
                facts=facts,
                watch=watch,
                stop=stop,
            )
            if done is None:
                break
            entries, rows, source = done
            if need_some and all("error" in row for row in rows):
                count, first = len(rows) // len(entries), rows[0]["error"]
                raise MMJaxError(
                    f"task {task.name}: none of its {count:,} questions could be asked: {first}"
                )
            scored = not all(row.get("unscored") for row in rows)
            if scored:
                results[task.name] = entries
            elif progress and workdir is None:
                console.print(f"{task.name}: a test split has nothing to score; give a workdir")
            if workdir is not None:
                _keep(task, entries if scored else {}, rows, source, workdir, console)
                kept.append(task.name)
    return results


def check_names(tasks: Sequence[Task]) -> None:
    """Raise MMJaxError for tasks of one name, or of two that one file would stand for."""
    names = [t.name for t in tasks]
    if len({predictions_path("", name) for name in names}) != len(names):
        raise MMJaxError(
            f"tasks need different names, that make different files, got {', '.join(names)}"
        )


def _keep(
    task: Task,
    entries: Mapping[str, Any],
    rows: list[dict[str, Any]],
    source: Sequence[Record],
    workdir: str | os.PathLike,
    console: Console,
) -> None:
    """Write what came out of a task; entries: none of a test split."""
    try:
        written = save_predictions(task, rows, source, os.fspath(workdir))
        if entries:
            merge_results(os.path.join(workdir, "results.json"), {task.name: entries})
    except OSError as error:
        raise MMJaxError(
            f"the results of {task.name} cannot be written to {workdir}: {error.strerror}; "
            "make room there, or give another --workdir, and evaluate again"
        ) from error
    for path in written:
        console.print(f"{task.name}: for the benchmark's server: {path}")


@contextlib.contextmanager
def _tell_kept(
    kept: Sequence[str], workdir: str | os.PathLike | None, console: Console
) -> Iterator[None]:
    """Say at an interruption by the keyboard which tasks were finished before: they stay."""
    try:
        yield
    except KeyboardInterrupt:
        if kept:
            console.print(
                f"{', '.join(kept)}: finished, kept in {workdir}; started again with the other "
                "tasks alone, the report shows all"
            )
        raise


def as_metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Flatten results for a writer: ``eval/<task>/accuracy``, in a sweep ``accuracy_<key>`` too.

    The plain accuracy is that of the highest resolution; so are a summary's metrics.
    """
    out: dict[str, float] = {}
    for task, entries in results.items():
        best = max(entries.values(), key=lambda e: e.get("longest_side") or 0)
        out[f"eval/{task}/accuracy"] = best["accuracy"]
        for name, metric in best.get("metrics", {}).items():
            out[f"eval/{task}/{name.replace(' ', '_')}"] = metric["value"]
        if len(entries) > 1:
            out |= {f"eval/{task}/accuracy_{k}": e["accuracy"] for k, e in entries.items()}
    return out


def _run_task(
    task: Task,
    generate_fn: Generate,
    *,
    batch_size: int,
    limit: int | None,
    facts: Mapping[str, Any],
    watch: Callable[[list[list[int]], str], Iterator[list[int]]],
    stop: Callable[[], bool],
) -> tuple[dict[str, Any], list[dict[str, Any]], Sequence[Record]] | None:
    """Ask one task at all its resolutions; returns (results, rows, source), None when stopped.

    facts: kept with each result. watch: shows how far the batches of a label have come.
    """
    source = open_source(task.source)
    most = min((n for n in (limit, task.limit) if n is not None), default=None)
    indices = chosen(source, most)
    if not indices:
        raise MMJaxError(f"task {task.name}: its source holds no records")
    # Enough to know sizes; a source may be large.
    native = picture_size(_readable(source, indices[:32]))
    facts = _facts(task, source, indices, blind=limit is None) | {"limit": most, **facts}
    demos = demonstrations(task)
    if demos is not None and task.rices is not None:
        label = f"{task.name}: pictures of examples"
        demos = by_likeness(task, demos, watch=lambda batches: watch(batches, label), stop=stop)
        if demos is None:
            return None
    entries: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for resolution in task.resolutions:
        start = time.perf_counter()
        key = task.result_key(resolution)
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        mine: list[dict[str, Any]] = []
        for batch in watch(batches, task.name if key == task.split else f"{task.name} at {key}"):
            if stop():
                return None
            mine += ask_batch(task, source, batch, resolution, generate_fn, demos)
        rows += mine
        side = resolution or native
        if resolution and native and not task.enlarge:
            side = min(resolution, native)
        counted = [r for r in mine if not r.get("unscored")] or mine  # of a test split none
        unreadable = sum("error" in r for r in counted)
        entries[key] = {
            **summarise(counted, task.summariser),
            **facts,
            "resolution": resolution,
            "longest_side": side,
            "seconds": round(time.perf_counter() - start, 3),
            **({"unreadable": unreadable} if unreadable else {}),
        }
    return entries, rows, source


def _facts(
    task: Task, source: Sequence[Record], indices: Sequence[int], *, blind: bool
) -> dict[str, Any]:
    """Return what is kept with each result of a task: how it is asked, what a guess would reach.

    blind: work out, where the task has training records, what needs no picture.
    """
    facts: dict[str, Any] = {"split": task.split, "scorer": task.scorer, "summary": task.summary}
    facts |= {"prompt": task.prompt, "cut": task.cut, "max_new_tokens": task.max_new_tokens}
    if task.rank is not None:
        facts |= {"rank": task.rank, "options": list(task.options) or "of each record"}
    facts |= {"source": source_settings(task.source)}
    if task.train is not None and blind:
        train = open_source(task.train)
        known = _readable(train, spread(len(train), task.train_limit))
        facts["blind"] = blind_baselines(task, _readable(source, indices), known)
    some = [indices[i] for i in spread(len(indices), 1000)]
    chance = chance_level(task, _readable(source, some))
    if chance is not None:
        facts["chance"] = chance
    if task.demos is not None:
        facts |= {"shots": task.shots, "text_shots": task.text_shots}
    if task.rices is not None:
        facts |= {"rices": os.path.basename(os.path.normpath(task.rices))}
    if task.orders is not None:
        facts |= {"orders": task.orders}
    return facts


def _readable(source: Sequence[Record], indices: Sequence[int]) -> Iterator[Record]:
    for index in indices:
        try:
            yield source[index]
        except BadSample:
            continue
