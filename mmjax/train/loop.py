"""The one training loop: ``run`` from top to bottom, and what one step is."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import jax
from flax import nnx

from mmjax import runtime
from mmjax.checkpoint import CheckpointManager
from mmjax.loaded import LoadedModel
from mmjax.monitor.profile import ProfileWindow
from mmjax.monitor.writers import require_wandb
from mmjax.parallel.mesh import check_batch, make_mesh, use
from mmjax.parallel.sharding import put_batch
from mmjax.train import adapters, evaluation, lengths, optim, startup, tasks
from mmjax.train.build import check_attention, train_iterator
from mmjax.train.changes import about_frozen, changed
from mmjax.train.design import Design, make_design
from mmjax.train.export import export_model
from mmjax.train.initial import init_frozen, init_state
from mmjax.train.loss import LossOptions, source_weights
from mmjax.train.reports import Reports
from mmjax.train.saved import answering
from mmjax.train.settings import RunSettings, check_numbers
from mmjax.train.step import compile_step, make_train_step
from mmjax.train.stop import StopFlag
from mmjax.train.validation import ValidationLoss
from mmjax.train.workdir import check_results, disk_asked, held, write_config
from mmjax.types import Batch, MMJaxError


def run(settings: RunSettings, workdir: str | Path) -> dict[str, float]:
    """Train as the settings say, or go on where the workdir stands; returns the last metrics.

    Writes into the workdir, which one run at a time may have: config.json, metrics.jsonl, events
    (TensorBoard), skipped.jsonl, samples.jsonl, checkpoints/, and at the end model/, predictions/,
    results.json and report.html.
    SIGTERM or SIGHUP saves and returns; starting again continues with the very next batch.
    """
    workdir = Path(workdir)
    check_numbers(settings)
    profile = ProfileWindow(settings.log.profile, workdir / "profile")
    runtime.enable_compilation_cache()
    mesh = make_mesh(settings.mesh)
    check_batch(mesh, settings.data.batch_size, settings.data.seq_len, settings.accumulate)
    lengths.check_lengths(settings.data, mesh)
    lead = jax.process_index() == 0
    with held(workdir) if lead else nullcontext(), use(mesh), StopFlag() as stop:
        if lead and settings.eval.tasks:
            check_results(workdir)
        if lead and settings.log.wandb:
            require_wandb(settings.log.wandb)
        design = make_design(settings, mesh)
        check_attention(settings.model, ranges=True)
        tasks.check(settings, design.plan.processor, design.plan.config.vocab_size)
        if lead:
            startup.print_startup(mesh, design, workdir)
        training = Training(design, workdir, mesh, stop)
        if lead:  # what was restored fits: the config on disk is never that of a run that could not
            write_config(design.settings, workdir)
        try:
            if training.catch_up():
                for step in range(training.first, settings.steps):
                    profile.before(step, training.state)
                    if not training.step(step):
                        break
        except Exception:
            training.checkpoints.end()
            raise
        finally:
            training.reports.line.close()  # gives the terminal back, whatever happened
        profile.close(training.state)
        training.finish()
        training.close()
        return training.metrics


class Training:
    """A run under way: its state, which every step replaces, and the parts around it.

    Made, it stands where the workdir stands. first: steps done before. metrics: the newest of each.
    """

    def __init__(self, design: Design, workdir: Path, mesh: jax.sharding.Mesh, stop: StopFlag):
        settings, plan, outline = design.settings, design.plan, design.outline
        self.settings, self._design = settings, design
        self._workdir, self._mesh, self._stop = workdir, mesh, stop
        self._batches = train_iterator(settings, plan.processor, workdir)
        names = self._batches.source_names
        weights = source_weights(settings.data.loss_weights, names)
        self.checkpoints = CheckpointManager(
            workdir, settings.checkpoint, about={"name": settings.name}
        )
        self._graphdef = graphdef = outline.graphdef
        changes: dict[str, str] = {}
        if self.checkpoints.latest is None:
            self.state, self.frozen = init_state(plan, settings, outline, mesh)
        else:
            adapters.check_same(workdir, plan.lora, plan.names())
            changes = changed(settings, workdir)
            self.state = self.checkpoints.restore(outline.state, self._batches)
            self.frozen = init_frozen(plan, settings, outline, mesh)
        self.first = int(self.state.step)
        if self.first > settings.steps:
            raise MMJaxError(
                f"{workdir} stands at step {self.first} and config.steps is {settings.steps}; "
                "raise config.steps to go on, or choose a new --workdir"
            )
        self._step = compile_step(
            make_train_step(
                graphdef, outline.tx, outline.schedule,
                loss=LossOptions(len(names), weights, settings.loss_chunk),
                accumulate=settings.accumulate, seed=settings.seed, rows=design.rows,
                bad_steps=settings.bad_steps, rates=optim.shares(settings.optim),
            ),
            outline.state,
        )  # fmt: skip
        self.reports = Reports(
            design, workdir, mesh, graphdef=graphdef, batches=self._batches,
            checkpoints=self.checkpoints, first=self.first,
        )  # fmt: skip
        self.reports.line.reader_gone = stop.ask
        self._tasks = tasks.tasks_of(settings.eval)
        if settings.eval.every:
            self._tasks = tasks.opened(self._tasks)
        self._validation = ValidationLoss(self._tasks, settings, plan.processor, graphdef, mesh)
        self.metrics: dict[str, float] = {}
        self._measured: dict[str, float] = {}  # at the step that was made last, for its checkpoint
        self._owed = False  # a signal came where an evaluation was due
        if 0 < self.first < settings.steps:
            told = about_frozen(changes, bool(jax.tree.leaves(self.frozen)))
            for text in (f"continuing at step {self.first}", *changes.values(), *told):
                self.reports.line.print(text)

    def catch_up(self) -> bool:
        """Evaluate where the run was stopped before it could; False when told to stop again."""
        if self.checkpoints.notes.get("evaluation_owed"):
            self._evaluate(self.first)
            if not self._owed:
                self.checkpoints.add_metrics(self.first, self._measured)
        return not self._owed

    def step(self, step: int) -> bool:
        """Make one step and do what is due behind it; False when the run was told to stop.

        The order: save, then take a batch. A saved iterator therefore stands where the saved
        parameters stand.
        """
        local, batch = self._next_batch(step)
        self.state, metrics = self._step(self.state, self.frozen, batch)
        done = step + 1
        self.metrics |= self.reports.started(done, metrics, local)
        self._measured = {}
        last = done == self.settings.steps
        evaluating = self._evaluates(done, last)
        saving, stopping = self.checkpoints.due(done), self._stop.agreed()
        if evaluating or saving or stopping or last:
            jax.block_until_ready(self.state)  # or the pause would swallow steps under way
            self._note(self.reports.watch.settle(last=last))  # no bad step is saved
        if stopping:
            self._owed = evaluating
            return False
        if evaluating:
            self._evaluate(done)
            if self._owed:
                return False
        if saving:
            self._save(done)
        self.checkpoints.check()
        return True

    def finish(self) -> None:
        """Save the last step; unless the run was stopped, write its model and evaluate it.

        Raises MMJaxError when the last step could not be saved.
        """
        done, settings = int(self.state.step), self.settings
        if done and self.checkpoints.latest != done:
            self._save(done)
        self.checkpoints.require(done)
        self.reports.tell_left_out()
        if self._stop:
            line = f"{self._stop.signal}: saved step {done}; start again to continue"
            self.reports.line.print(line)
            return
        if settings.checkpoint.export:
            design = self._design
            fix = f"step {done} is saved: make room and start again, and it is written"
            with disk_asked(self._workdir / "model", fix):
                plan, chosen = design.plan, design.outline.chosen
                before = () if plan.source is None else plan.source.trained
                folder = self._workdir / "model"
                export_model(self._model(), folder, plan.lora, chosen, before)
        if settings.eval.tasks and settings.eval.final:
            got = evaluation.full(
                self._model(), settings, self._workdir, step=done,
                checkpoint_name=str(self._workdir), stop=self._stop.agreed,
            )  # fmt: skip
            if self._stop:
                line = f"{self._stop.signal}: the evaluation is not finished; start again for it"
                self.reports.line.print(line)
                return
            got |= self._validation(self.state.params, self.frozen)
            self.metrics |= got
            self.reports.writer.scalars(done, got)

    def close(self) -> None:
        """Release files and end the data workers."""
        self.checkpoints.close()
        self.reports.writer.close()
        self._batches.close()

    def _next_batch(self, step: int) -> tuple[Batch, Batch]:
        """Return the next batch, this process's rows of it and on the devices, and tell of it."""
        with self.reports.meter.wait():
            local = next(self._batches)
        # Apart: of several processes all agree on it, behind the step that is under way.
        local = lengths.fitted(local, self.settings.data.lengths)
        self.reports.picture(step, local)
        batch = put_batch(local, self._mesh, self.settings.data.batch_size)
        self.reports.sample(step, local, batch, self.state, self.frozen)
        return local, batch

    def _evaluates(self, step: int, last: bool) -> bool:
        """Tell whether a sample is asked after a step; the last one's only to find the best."""
        settings = self.settings
        due = settings.eval.every and step % settings.eval.every == 0
        return bool(due and settings.eval.tasks and (not last or settings.checkpoint.best))

    def _note(self, metrics: dict[str, float]) -> None:
        """Keep what was measured at the step that was made last."""
        self.metrics |= metrics
        self._measured |= metrics

    def _evaluate(self, step: int) -> None:
        """Ask a sample of every task, and compute the validation loss.

        A signal ends it, and what was found until then is dropped: it is owed to the next start.
        """
        with self.reports.meter.pause():
            got = evaluation.sample(self._model(), self.settings, self._tasks, self._stop.agreed)
            if self._stop:
                self._owed = True
                return
            got |= self._validation(self.state.params, self.frozen)
            self._note(got)
            self.reports.evaluated(step, got)

    def _save(self, step: int) -> None:
        """Start saving a step; the disk works on it while training goes on."""
        with self.reports.meter.pause():
            notes = {"bad_steps": self.reports.watch.bad, "evaluation_owed": self._owed}
            self.checkpoints.save(step, self.state, self._batches, self._measured, notes)

    def _model(self) -> LoadedModel:
        """Return the model as it stands."""
        plan = self._design.plan
        model = nnx.merge(self._graphdef, self.state.params, self.frozen)
        beside = sum(x.nbytes for x in jax.tree.leaves(self.state.opt)) // self._mesh.size
        return answering(plan, model, self._mesh, self.settings, beside)
