"""The tasks of a run: made of its settings, and looked at before hours are spent."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mmjax.data.benchmarks.files import read_json
from mmjax.data.templates import answered, asking, get_template
from mmjax.evals.few_shot import demonstrations
from mmjax.evals.runner import check_names
from mmjax.evals.scorers import get_scorer
from mmjax.evals.tasks import (
    Task,
    answers_of,
    ask,
    choices_of,
    make_task,
    open_source,
    options_of,
)
from mmjax.generate.beam import Beams
from mmjax.home import in_home
from mmjax.models.api import Processor
from mmjax.models.clip import open_clip
from mmjax.train.settings import EvalSettings, RunSettings
from mmjax.types import BadSample, MMJaxError, nearest


def tasks_of(settings: EvalSettings) -> list[Task]:
    """Make the tasks of a config; raises MMJaxError for what they cannot be."""
    tasks = [make_task(t, f"config.eval.tasks[{i}]") for i, t in enumerate(settings.tasks)]
    check_names(tasks)
    return tasks


def with_tasks(settings: RunSettings, path: str | Path) -> RunSettings:
    """Return the settings with the tasks of a JSON file: a list of them, or one."""
    found = in_home(read_json(path, 'a JSON file of tasks, such as [{"benchmark": "pope", ...}]'))
    tasks = found if isinstance(found, list) else [found]
    if not tasks or not all(isinstance(task, dict) for task in tasks):
        raise MMJaxError(f"{path}: expected a list of tasks, each an object of settings")
    for task in tasks:  # JSON has lists alone
        lists = (name for name in ("resolutions", "options") if isinstance(task.get(name), list))
        task |= {name: tuple(task[name]) for name in lists}
    eval_settings = dataclasses.replace(settings.eval, tasks=tuple(tasks))
    return dataclasses.replace(settings, eval=eval_settings)


def check(
    settings: RunSettings, processor: Processor | None = None, vocabulary: int | None = None
) -> None:
    """Raise MMJaxError for what the first evaluation, or ``checkpoint.best``, would stumble on.

    Sources of tasks are opened and their first record is looked at: a run must not end after days
    because of a path. vocabulary: the model's number of tokens.
    """
    tasks, chosen = tasks_of(settings.eval), settings.eval
    if tasks and (chosen.every or chosen.final):
        check_tasks(settings)
        check_processor(settings, processor)
        if vocabulary is not None:
            beams_of(chosen).check_vocabulary(vocabulary)
    if (best := settings.checkpoint.best) is None:
        return
    known = [name for task in tasks for name in metric_names(task)]
    if best not in known:
        raise MMJaxError(
            f"checkpoint.best is {best!r}, and no evaluation reports an accuracy of this name"
            f"{nearest(best, known)}; there are {', '.join(known) or 'no tasks'}"
        )
    every, saved = chosen.every, settings.checkpoint.every
    if every < 1 or every % saved:
        raise MMJaxError(
            f"checkpoint.best is {best!r}, eval.every is {every} and checkpoint.every {saved}: the "
            "best is among the steps that are both evaluated and saved; make eval.every a "
            f"multiple of checkpoint.every, such as {max(1, every // saved) * saved}"
        )


def metric_names(task: Task) -> list[str]:
    """Return the names of a task's accuracies and metrics, the plain ones of the largest size."""
    name = f"eval/{task.name}/accuracy"
    keys = [task.result_key(resolution) for resolution in task.resolutions]
    names = [name, *(f"{name}_{key}" for key in keys if len(keys) > 1)]
    summed = task.summariser.names if task.summariser else ()
    return [*names, *(f"eval/{task.name}/{one.replace(' ', '_')}" for one in summed)]


def check_tasks(settings: RunSettings) -> None:
    """Raise MMJaxError for what asking the tasks would stumble on; loads no model."""
    get_template(template_of(settings))
    beams_of(settings.eval)
    if settings.eval.batch_size < 1:  # eval.py trains nothing and asks for no other number
        raise MMJaxError(
            f"config.eval.batch_size is {settings.eval.batch_size}; it must be at least 1"
        )
    for task in tasks_of(settings.eval):
        if task.rank is not None:
            answered(template_of(settings))
        _check_sources(task)


def check_processor(settings: RunSettings, processor: Processor | None) -> None:
    """Raise MMJaxError for a template of other tokens, and a resolution that is never shown."""
    if (check := getattr(processor, "check_template", None)) is not None:
        check(get_template(template_of(settings)))
    if (check := getattr(processor, "check_resolution", None)) is not None:
        for task in tasks_of(settings.eval):
            for side in filter(None, task.resolutions):
                check(side)


def template_of(settings: RunSettings) -> str:
    """Return the name of the template that tasks are asked by.

    Raises MMJaxError where neither ``eval.template`` nor ``data.template`` tells it.
    """
    if settings.eval.template is not None:
        return settings.eval.template
    trained = settings.data.template
    return asking([trained] if isinstance(trained, str) else trained.values())


def _check_sources(task: Task) -> None:
    """Open what a task reads, and score no answer to its first question."""
    if task.summariser:
        task.summariser.check()
    source = open_source(task.source)
    for name, records in (("source", source), ("demos", task.demos), ("train", task.train)):
        if records is not None and not len(open_source(records)):
            raise MMJaxError(f"task {task.name}: its {name} holds no records")
    demos = demonstrations(task)
    if task.rices is not None:
        open_clip(task.rices, asked=task.rices_config)
    with contextlib.suppress(BadSample):  # one that cannot be read counts as wrong
        first = ask(task, source[0])
        if task.rank is not None:
            options_of(task, first)
        if not first.meta.get("unscored"):
            get_scorer(task.scorer)("", answers_of(first), choices_of(first))
        if demos is not None:
            demos.before(first, 0)


def opened(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks whose sources are open: a run asks them again and again."""
    return [
        dataclasses.replace(
            task,
            source=open_source(task.source),
            demos=None if task.demos is None else open_source(task.demos),
        )
        for task in tasks
    ]


def beams_of(settings: EvalSettings) -> Beams:
    """Return how tasks are searched; raises MMJaxError for numbers that no search has."""
    return Beams(settings.num_beams, settings.length_penalty)
