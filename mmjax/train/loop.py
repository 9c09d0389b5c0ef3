"""The one training loop, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.text import Text

from mmjax import runtime
from mmjax.checkpoint import Checkpoints
from mmjax.loading import LoadedModel
from mmjax.models import converted, registry
from mmjax.monitor.flops import find_peak
from mmjax.monitor.meter import Meter
from mmjax.monitor.pictures import draw_batch, save_picture
from mmjax.monitor.profile import ProfileWindow
from mmjax.monitor.terminal import LiveLine
from mmjax.monitor.writers import make_writer
from mmjax.nn import paths, quantized
from mmjax.nn.linear import LoRA
from mmjax.parallel.mesh import check_batch, make_mesh, use
from mmjax.parallel.sharding import check_divides, put_batch
from mmjax.train import evaluation, lengths, optim, startup, tuning, vocabulary
from mmjax.train import frozen as frozen_part
from mmjax.train import rows as trained_rows
from mmjax.train import state as train_state
from mmjax.train.build import (
    blueprint,
    check_attention,
    check_fresh,
    init_state,
    train_iterator,
)
from mmjax.train.flops import step_flops
from mmjax.train.loss import source_weights
from mmjax.train.samples import Samples
from mmjax.train.settings import RunSettings
from mmjax.train.step import compile_step, make_train_step
from mmjax.train.stop import StopFlag
from mmjax.train.validation import ValidationLoss
from mmjax.train.watch import StepWatch
from mmjax.types import MMJaxError


def run(settings: RunSettings, workdir: str | Path) -> dict[str, float]:
    """Train as the settings say, or go on where the workdir stands; returns the last metrics.

    Writes into the workdir: config.json, metrics.jsonl, events (TensorBoard), skipped.jsonl,
    samples.jsonl, checkpoints/, and at the end model/, predictions/, results.json and report.html.
    SIGTERM saves and returns; starting again continues with the very next batch.
    """
    workdir = Path(workdir)
    check(settings)
    profile = ProfileWindow(settings.log.profile, workdir / "profile")
    workdir.mkdir(parents=True, exist_ok=True)
    runtime.enable_compilation_cache()
    mesh = make_mesh(settings.mesh)
    check_batch(mesh, settings.data.batch_size, settings.data.seq_len, settings.accumulate)
    lengths.check_lengths(settings.data, mesh)
    with use(mesh), StopFlag() as stop:
        # ---- The model, before anything is allocated ------------------------------------------
        settings, told = tuning.applied(settings)
        choose = partial(train_state.chosen_by, settings)
        plan = blueprint(settings.model, settings.lora, settings.seed, choose)
        check_attention(settings.model, ranges=True)
        names = plan.names()
        chosen = train_state.chosen_by(settings, names)
        optim.check_decay(settings.optim, names)
        own_rate = optim.by_rate(settings.optim, chosen)
        tx = optim.make_optimizer(settings.optim, settings.steps)
        schedule = optim.schedule(settings.optim, settings.steps)
        _, abstract, abstract_frozen = train_state.abstract_state(plan.make, chosen, tx, mesh)
        check_divides(paths.flatten(abstract.params) | paths.flatten(abstract_frozen))
        vocabulary.check_new_tokens(
            plan.new_rows, plan.processor, (abstract.params, abstract_frozen), chosen
        )
        told |= check_fresh(plan, chosen)
        rows = trained_rows.resolve(
            settings.train_rows, abstract.params, plan.processor, plan.new_rows
        )
        lead = jax.process_index() == 0
        if lead:
            write_config(settings, workdir)
            told |= startup.rate_lines(own_rate, settings.optim, abstract.params)
            told |= trained_rows.describe(rows, plan.processor)
            if plan.source_rows:
                size = plan.config.vocab_size
                told["vocabulary"] = f"{plan.source_rows} rows grow to {size}: the others' mean"
            table = startup.part_rows(abstract, abstract_frozen, settings, rows)
            startup.print_startup(mesh, table, settings, workdir, told)

        # ---- Data, and the state: restored, or new --------------------------------------------
        batches = train_iterator(settings, plan.processor, workdir)
        weights = source_weights(settings.data.loss_weights, batches.source_names)
        checkpoints = Checkpoints(workdir, settings.checkpoint, about={"name": settings.name})
        graphdef, state, frozen = init_state(plan, settings, chosen, tx, mesh)
        if checkpoints.latest is not None:
            state = checkpoints.restore(abstract, batches)
        first = int(state.step)
        if first > settings.steps:
            raise MMJaxError(
                f"{workdir} stands at step {first} and config.steps is {settings.steps}; raise "
                "config.steps to go on, or choose a new --workdir"
            )

        # ---- The step -------------------------------------------------------------------------
        step_fn = compile_step(
            make_train_step(
                graphdef, tx, schedule,
                accumulate=settings.accumulate, loss_chunk=settings.loss_chunk,
                seed=settings.seed, num_sources=len(batches.source_names),
                max_loss=settings.bad_steps.max_loss,
                skip_bad=settings.bad_steps.action == "skip",
                rows=rows, source_weights=weights, rates=optim.shares(settings.optim),
            ),
            abstract,
        )  # fmt: skip
        writer = make_writer(
            workdir, tensorboard=settings.log.tensorboard, wandb=settings.log.wandb,
            name=settings.name, config=dataclasses.asdict(settings), process=jax.process_index(),
        )  # fmt: skip
        sizes = frozen_part.sizes(abstract.params, abstract_frozen)
        flops = step_flops(plan.config, settings.data, sizes, chosen)
        peak = find_peak(list(mesh.devices.flat), settings.model.dtype)
        meter = Meter(settings.steps, start_step=first, peak_flops=peak and peak.flops)
        line = LiveLine(settings.steps, enabled=lead)
        batches.warn = checkpoints.warn = writer.warn = line.warn
        watch = StepWatch(
            settings.bad_steps, workdir, every=settings.log.every, writer=writer, meter=meter,
            line=line, source_names=batches.source_names, last_checkpoint=checkpoints.newest,
            bad=checkpoints.notes.get("bad_steps", 0),
        )  # fmt: skip
        tasks = evaluation.tasks_of(settings.eval)
        validation = ValidationLoss(tasks, settings, plan.processor, graphdef, mesh)
        samples = None
        if settings.log.samples:
            samples = Samples(graphdef, plan.processor, workdir, mesh, writer)
        metrics: dict[str, float] = {}

        def live_model() -> LoadedModel:
            model = nnx.merge(graphdef, state.params, frozen)
            return LoadedModel(plan.family, plan.config, model, plan.processor, mesh)

        # ---- Training -------------------------------------------------------------------------
        # The order within a step: save, then take a batch. A saved iterator therefore stands
        # where the saved parameters stand.
        if first and first < settings.steps:
            line.print(f"continuing at step {first}")
        for step in range(first, settings.steps):
            profile.before(step, state)
            with meter.wait():
                local = lengths.fitted(next(batches), settings.data.lengths)
            if lead and settings.log.pictures and step % settings.log.pictures == 0:
                with meter.pause():
                    show_batch(local, batches.records, plan.processor, step, workdir, writer)
            batch = put_batch(local, mesh, settings.data.batch_size)
            if samples and step % settings.log.samples == 0:
                with meter.pause():
                    told_of = samples(step, local, batch, state.params, frozen, batches.records)
                    line.print(Text(told_of))
            state, now = step_fn(state, frozen, batch)
            done = step + 1
            metrics |= watch.settle()  # the step before, while this one is under way
            watch.expect(done, now, batches.records)
            parts = settings.data.batch_size // len(local["tokens"])  # like this process's
            tokens = int(np.count_nonzero(local["segment_ids"])) * parts
            images = batches.images * parts
            meter.step(tokens=tokens, images=images, flops=flops(local))
            evaluating = settings.eval.every and done % settings.eval.every == 0
            evaluating = evaluating and done < settings.steps and settings.eval.tasks
            saving, stopping = checkpoints.due(done), stop.agreed(done)
            if evaluating or saving or stopping or done == settings.steps:
                jax.block_until_ready(state)  # or the pause would swallow steps under way
                metrics |= watch.settle(last=done == settings.steps)  # no bad step is saved
            if stopping:
                break
            if evaluating:
                with meter.pause():
                    got = evaluation.sample(live_model(), settings.eval, lambda: bool(stop))
                    got |= validation(state.params, frozen)
                    metrics |= got
                    writer.scalars(done, got)
                    line.print(f"step {done}: {brief(got)}")
            if saving:
                with meter.pause():
                    checkpoints.save(done, state, batches, metrics, {"bad_steps": watch.bad})
            checkpoints.check()
        done = int(state.step)

        # ---- The end --------------------------------------------------------------------------
        line.close()
        profile.close(state)
        if done and checkpoints.latest != done:
            checkpoints.save(done, state, batches, metrics, {"bad_steps": watch.bad})
        checkpoints.require(done)
        if stop:
            line.print(f"{stop.signal}: saved step {done}; start again to continue")
        else:
            if settings.checkpoint.export:
                export(live_model(), workdir, plan.lora, chosen)
            if settings.eval.tasks and settings.eval.final:
                got = evaluation.full(
                    live_model(), settings, workdir, step=done,
                    checkpoint_name=str(workdir), stop=lambda: bool(stop),
                )  # fmt: skip
                got |= validation(state.params, frozen)
                metrics |= got
                writer.scalars(done, got)
        checkpoints.close()
        writer.close()
        batches.close()
        return metrics


def show_batch(batch, records, processor, step: int, workdir: Path, writer) -> None:
    """Draw a batch as the model sees it into the workdir's ``pictures/`` and for the writers."""

    def token_text(token: int) -> str:
        return str(processor.tokenizer.convert_ids_to_tokens(token)).replace("\u2581", " ")

    # A family whose rows of patches are whole images says how one is drawn.
    pixels = draw_batch(batch, records, token_text, picture=getattr(processor, "picture", None))
    try:
        save_picture(workdir / "pictures" / f"step_{step:07}.png", pixels)
    except OSError as error:
        writer.warn(f"the picture of step {step} could not be written: {error}")
    writer.picture(step, "data/batch", pixels)


def brief(metrics: dict[str, float]) -> str:
    """Write accuracies in a line: ``vqa 91.0%``, those of lower resolutions in brackets."""
    parts = []
    for name, value in metrics.items():
        if name.endswith("/accuracy"):
            task = name.removeprefix("eval/").removesuffix("/accuracy")
            rest = [
                f"{other.rpartition('_')[2]}: {v:.1%}"
                for other, v in metrics.items()
                if other.startswith(f"{name}_") and v != value
            ]
            parts.append(f"{task} {value:.1%}" + (f" ({', '.join(rest)})" if rest else ""))
    return ", ".join(parts)


def check(settings: RunSettings) -> None:
    """Raise MMJaxError for numbers that cannot work, before anything is built."""
    positive = {
        "steps": settings.steps, "accumulate": settings.accumulate,
        "loss_chunk": settings.loss_chunk, "data.batch_size": settings.data.batch_size,
        "data.seq_len": settings.data.seq_len, "data.max_targets": settings.data.max_targets,
        "log.every": settings.log.every, "checkpoint.every": settings.checkpoint.every,
        "checkpoint.keep": settings.checkpoint.keep,
    }  # fmt: skip
    for name, value in positive.items():
        if value < 1:
            raise MMJaxError(f"config.{name} is {value}; it must be at least 1")


def export(model: LoadedModel, workdir: Path, lora: LoRA | None, trained: set[str]) -> None:
    """Write workdir/model, a folder that ``mmjax.load`` and ``convert_weights.to_hf`` read."""
    after = getattr(model.config, "after_training", None)
    with tempfile.TemporaryDirectory() as folder:
        model.processor.save_pretrained(folder)
        converted.save_model(
            workdir / "model",
            quantized.multiplied_out(nnx.state(model.model), frozen_part.REST),
            family=registry.family(model.family),
            config=model.config if after is None else after(trained),
            lora=lora,
            folders=(Path(folder),),
            overwrite=True,
        )


def write_config(settings: RunSettings, workdir: Path) -> None:
    """Write the settings as JSON, for the record and for eval.py's report."""
    text = json.dumps(dataclasses.asdict(settings), indent=1, default=str)
    part = workdir / "config.json.part"
    part.write_text(text + "\n")
    part.replace(workdir / "config.json")  # a kill leaves the old file or the new one
