"""Evaluation of a run's model: while it trains, at its end, and from ``eval.py``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from mmjax import __version__, checkpoint_steps, runtime
from mmjax.evals import report, runner
from mmjax.evals.answer import Answerer
from mmjax.evals.table import metric_tables, results_table
from mmjax.evals.tasks import Task
from mmjax.loaded import LoadedModel
from mmjax.loading import load
from mmjax.models import opening
from mmjax.parallel.mesh import make_mesh
from mmjax.train import frozen as frozen_part
from mmjax.train.saved import open_step
from mmjax.train.settings import RunSettings
from mmjax.train.tasks import beams_of, check_processor, check_tasks, tasks_of, template_of
from mmjax.train.workdir import as_trained, check_family, check_results, disk_asked
from mmjax.types import MMJaxError


def sample(
    model: LoadedModel,
    settings: RunSettings,
    tasks: Sequence[Task],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Ask a sample of every task while training; returns ``eval/<task>/accuracy``."""
    got = runner.evaluate(
        tasks,
        _answerer(model, settings),
        batch_size=settings.eval.batch_size,
        limit=settings.eval.limit,
        progress=False,
        stop=stop,
    )
    return runner.as_metrics(got)


def full(
    model: LoadedModel,
    settings: RunSettings,
    workdir: Path,
    *,
    step: int | None,
    checkpoint_name: str,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Ask everything; writes results.json, predictions and report.html, prints the table."""
    batch = settings.eval.batch_size
    lead = jax.process_index() == 0
    got = runner.evaluate(
        tasks_of(settings.eval),
        _answerer(model, settings),
        workdir=workdir if lead else None,
        batch_size=4 * batch,  # enough to sort by length, so that little is padding
        step=step,
        progress=lead,
        stop=stop,
        need_some=True,
        asked={
            "checkpoint": checkpoint_name,
            "template": template_of(settings),
            "num_beams": settings.eval.num_beams,
            "length_penalty": settings.eval.length_penalty,
        },
    )
    if lead and got:
        console = Console(width=None if sys.stdout.isatty() else 140)  # a log cuts nothing off
        console.print(results_table(got), *metric_tables(got))
        facts: dict[str, Any] = {
            "name": settings.name,
            "checkpoint": checkpoint_name,
            "step": step,
            "parameters": f"{count_parameters(model):,}",
            "versions": f"mmjax {__version__}, jax {jax.__version__}, "
            f"Python {sys.version.split()[0]}",
            "device": jax.devices()[0].device_kind,
        }
        with disk_asked(workdir / "report.html", "make room there; the results are written"):
            print(f"report: {report.report_workdir(workdir, facts)}")
    return runner.as_metrics(got)


def _answerer(model: LoadedModel, settings: RunSettings) -> Answerer:
    s = settings.eval
    return Answerer(
        model,
        template=template_of(settings),
        batch_size=s.batch_size,
        cache_dtype=s.cache_dtype,
        beams=beams_of(s),
    )


def count_parameters(model: LoadedModel) -> int:
    """Count all parameters of a model, quantised ones too; see ``frozen.count``."""
    return sum(frozen_part.sizes(nnx.state(model.model)).values())


def open_model(
    path: str | Path, settings: RunSettings, *, weights: str | None = None
) -> tuple[LoadedModel, int | None]:
    """Open what ``--checkpoint`` names: a workdir, one of its checkpoints, or a model folder.

    weights: as for ``mmjax.load``, of a model folder alone, which lies on the recipe's mesh and is
    asked with its ``model.processor`` as a run's is.

    Returns the model and, of a checkpoint, its step. A workdir gives the checkpoint that was best
    by ``checkpoint.best``, else the newest.
    """
    path = Path(path)
    if not _is_run(path):
        holds = opening.open_pretrained(path).family.name
        check_family(f"--checkpoint {path}", holds, settings.model.family)
        mesh, processor = make_mesh(settings.mesh), settings.model.processor
        options = dict(weights=weights, processor=processor, progress=True)
        return load(path, mesh=mesh, **options), None
    if weights is not None:
        raise MMJaxError(
            f"--weights={weights} is for model folders and {path} is a run's; give the folder that "
            "the run exported, WORKDIR/model"
        )
    workdir, step = checkpoint_steps.find_step(path, settings.checkpoint.best)
    return open_step(workdir, step, settings, make_mesh(settings.mesh))[1], step


def run_eval(
    settings: RunSettings, path: str, workdir: str | None, *, weights: str | None = None
) -> dict[str, float]:
    """Evaluate what ``eval.py`` was asked to; results go to the workdir.

    A run's model is as it was trained, see ``as_trained``, whatever the recipe says of it.
    """
    if not settings.eval.tasks:
        raise MMJaxError(
            "config.eval.tasks is empty: this recipe names nothing to evaluate; give "
            "--tasks=FILE.json"
        )
    if _is_run(Path(path)):
        settings = as_trained(settings, checkpoint_steps.find_step(path)[0])
    check_tasks(settings)
    folder = _results_folder(Path(path), workdir)
    runtime.enable_compilation_cache()
    model, step = open_model(path, settings, weights=weights)
    check_processor(settings, model.processor)
    _tell_other_words(model, settings)
    return full(model, settings, folder, step=step, checkpoint_name=str(path))


def _tell_other_words(model: LoadedModel, settings: RunSettings) -> None:
    """Warn where a model is asked in another template than its run asked it in."""
    asked = template_of(settings)
    if model.template not in (None, asked) and jax.process_index() == 0:
        print(
            f"warning: this model's run asked it in {model.template}, and this recipe asks in "
            f"{asked}; --config.eval.template={model.template} asks as it was trained",
            file=sys.stderr,
        )


def _is_run(path: Path) -> bool:
    """Tell a workdir or one of its checkpoints from a model; raises MMJaxError for neither."""
    if not path.exists():
        raise MMJaxError(
            f"--checkpoint {path} does not exist; give a workdir, one of its checkpoints, or a "
            "model folder"
        )
    if path.name == checkpoint_steps.FOLDER and (path.parent / "config.json").is_file():
        raise MMJaxError(
            f"--checkpoint {path} is where a run keeps its checkpoints; give the run, "
            f"{path.parent}, or one of them, {path}/STEP"
        )
    return checkpoint_steps.is_step(path) or (path / checkpoint_steps.FOLDER).is_dir()


def _results_folder(path: Path, workdir: str | None) -> Path:
    """Return where results go, after trying to write there."""
    is_run = _is_run(path)
    if workdir is None and not is_run:
        raise MMJaxError(f"--checkpoint {path} is a model folder; give --workdir for results")
    folder = checkpoint_steps.find_step(path)[0] if workdir is None else Path(workdir)
    with disk_asked(folder, "give another --workdir, or mend its path, rights or disk"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    check_results(folder)
    return folder
