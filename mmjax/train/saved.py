"""A saved step of a run, opened as a model: to be asked, or to be written for others."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
from flax import nnx

from mmjax import checkpoint_steps
from mmjax.loaded import LoadedModel
from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train.build import Blueprint, absent_files
from mmjax.train.design import Design, make_design
from mmjax.train.export import export_model
from mmjax.train.initial import init_frozen
from mmjax.train.settings import ModelSettings, RunSettings
from mmjax.train.tasks import template_of
from mmjax.train.workdir import read_config
from mmjax.types import MMJaxError
from mmjax.weights.writer import check_destination


def answering(
    plan: Blueprint,
    model: nnx.Module,
    mesh: jax.sharding.Mesh,
    settings: RunSettings,
    beside: int = 0,
) -> LoadedModel:
    """Return a run's model as ``mmjax.load`` would return its export: with the same end tokens.

    beside: see ``LoadedModel``.
    """
    template = None
    with contextlib.suppress(MMJaxError):  # trained in words that do not tell how to ask
        template = template_of(settings)
    return LoadedModel(
        *(plan.family, plan.config, model, plan.processor, mesh, plan.ends, beside),
        generation=plan.generation,
        template=template,
    )


def open_step(
    workdir: Path, step: int, settings: RunSettings, mesh: jax.sharding.Mesh
) -> tuple[Design, LoadedModel]:
    """Open a saved step of the run that was made with the settings; returns its design too."""
    with use(mesh):
        design = make_design(settings, mesh)
        outline = design.outline
        trained = outline.state.params
        values = checkpoint_steps.load_params(workdir, step, paths.flatten(trained))
        frozen = init_frozen(design.plan, design.settings, outline, mesh)
        model = nnx.merge(outline.graphdef, paths.replace(trained, values), frozen)
    return design, answering(design.plan, model, mesh, settings)


def export_step(
    path: str | Path,
    destination: str | Path,
    *,
    init: str | None = None,
    parts: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> tuple[Path, int]:
    """Write a saved step as a model folder, as a run writes its last; returns (workdir, step).

    path: a workdir, of which the step that was best by ``checkpoint.best`` is taken, else the
    newest, or one of its checkpoints. init, parts: where the frozen part is now, when it is not
    where ``model.init`` and ``model.parts`` of the run say. The model lies on the run's mesh where
    there are as many devices, else on one. Raises MMJaxError for what is no run, has no such step,
    or lacks files, before anything is made.
    """
    check_destination(Path(destination), overwrite)
    found, settings = _run_of(Path(path))
    workdir, step = checkpoint_steps.find_step(path, settings.checkpoint.best)
    if not (saved := workdir / checkpoint_steps.FOLDER / str(step)).is_dir():
        have = sorted(int(p.name) for p in saved.parent.glob("*") if p.name.isdigit())
        raise MMJaxError(f"{saved} is not there; {found} has steps {', '.join(map(str, have))}")
    own = settings.model
    _check_moved(workdir, own, init, parts or {})
    moved = {"parts": {**own.parts, **(parts or {})}} | ({"init": init} if init else {})
    # How attention is computed changes no weight, and may be for another machine.
    model = dataclasses.replace(own, **moved, attention="auto")
    if absent := absent_files(model):
        raise MMJaxError(
            f"the run in {workdir} began with {', '.join(absent)}, which is not here; say where it "
            "is: --init for model.init, --lm, --vision and so on for model.parts"
        )
    settings = dataclasses.replace(settings, model=model)
    design, loaded = open_step(workdir, step, settings, _mesh(settings))
    before = () if design.plan.source is None else design.plan.source.trained
    with use(loaded.mesh):
        export_model(
            loaded, Path(destination), design.plan.lora, design.outline.chosen, before,
            overwrite=overwrite,
        )  # fmt: skip
    return workdir, step


def _check_moved(
    workdir: Path, own: ModelSettings, init: str | None, parts: Mapping[str, str]
) -> None:
    """Raise MMJaxError for a place of something that the run did not begin with.

    What is frozen would be read from there: another model than the one that was trained.
    """
    had = [*(["model.init"] if own.init else []), *(f"model.parts {x}" for x in own.parts)]
    strange = ["--init"] if init and not own.init else []
    for name in parts:  # a file that is elsewhere may need the words for it anew
        if name not in own.parts and (name in ("lm", "vision") or not had):
            strange.append(f"--{name.replace('_', '-')}")
    if strange:
        raise MMJaxError(
            f"the run in {workdir} began with {', '.join(had) or 'random weights alone'}; leave "
            f"{', '.join(strange)} away"
        )


def _run_of(path: Path) -> tuple[Path, RunSettings]:
    """Return the workdir that a path is, or is a checkpoint of, and its run's settings."""
    path = path.absolute()
    workdir = path.parent.parent if checkpoint_steps.is_step(path) else path
    there = (workdir / checkpoint_steps.FOLDER).is_dir()
    if there and (settings := read_config(workdir)) is not None:
        return workdir, settings
    raise MMJaxError(
        f"{path} is no run of train.py: give its workdir, which has config.json and "
        f"{checkpoint_steps.FOLDER}/, or one of its checkpoints, {checkpoint_steps.FOLDER}/STEP"
    )


def _mesh(settings: RunSettings) -> jax.sharding.Mesh:
    try:
        return make_mesh(settings.mesh)
    except MMJaxError:  # of other devices than are here
        return make_mesh({}, jax.local_devices()[:1])
