"""What a run tells while it goes on: metrics, pictures and samples, the live line, bad steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.text import Text

from mmjax.checkpoint import CheckpointManager
from mmjax.data.skips import left_out
from mmjax.data.streams import Streams
from mmjax.monitor.flops import find_peak
from mmjax.monitor.meter import Meter
from mmjax.monitor.pictures import draw_batch, save_picture
from mmjax.monitor.terminal import LiveLine
from mmjax.monitor.writers import make_writer
from mmjax.train import frozen as frozen_part
from mmjax.train.design import Design
from mmjax.train.flops import step_flops
from mmjax.train.samples import Samples
from mmjax.train.state import TrainState
from mmjax.train.watch import StepWatch
from mmjax.types import Batch


class Reports:
    """The writers, the clock and the watch of a run; the first process shows and writes.

    first: the step that the run begins with. Warnings of its parts are printed above its live line.
    """

    def __init__(
        self,
        design: Design,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        *,
        graphdef: nnx.GraphDef,
        batches: Streams,
        checkpoints: CheckpointManager,
        first: int,
    ):
        settings, plan, outline = design.settings, design.plan, design.outline
        self._settings, self._processor = settings, plan.processor
        self._workdir, self._batches, self._first = workdir, batches, first
        self._lead = jax.process_index() == 0
        self.writer = make_writer(
            workdir, tensorboard=settings.log.tensorboard, wandb=settings.log.wandb,
            name=settings.name, config=dataclasses.asdict(settings), process=jax.process_index(),
            first=first,
        )  # fmt: skip
        sizes = frozen_part.sizes(outline.state.params, outline.frozen)
        self._flops = step_flops(plan.config, settings.data, sizes, outline.chosen)
        peak = find_peak(list(mesh.devices.flat), settings.model.dtype)
        self.meter = Meter(settings.steps, start_step=first, peak=peak)
        self.line = LiveLine(settings.steps, enabled=self._lead, alone=jax.process_count() == 1)
        batches.warn = checkpoints.warn = self.writer.warn = self.line.warn
        self.watch = StepWatch(
            settings.bad_steps, workdir, every=settings.log.every, writer=self.writer,
            meter=self.meter, line=self.line, source_names=batches.source_names,
            last_checkpoint=checkpoints.newest, bad=checkpoints.notes.get("bad_steps", 0),
            more=lambda: {"train/skipped": left_out(batches.skips)[0]},
        )  # fmt: skip
        self._samples = None
        if settings.log.samples:
            self._samples = Samples(graphdef, plan.processor, workdir, mesh, self.writer)

    def picture(self, step: int, local: Batch) -> None:
        """Draw a batch that is about to be trained on, if it is due; local: this process's rows."""
        every = self._settings.log.pictures
        if self._lead and every and step % every == 0:
            with self.meter.pause():
                self._draw(step, local)

    def sample(
        self, step: int, local: Batch, batch: Batch, state: TrainState, frozen: nnx.State
    ) -> None:
        """Tell of a sample that is about to be trained on, if it is due."""
        if self._samples and step % self._settings.log.samples == 0:
            with self.meter.pause():
                records = self._batches.records
                told = self._samples(step, local, batch, state.params, frozen, records)
                self.line.print(Text(told))

    def started(
        self, step: int, metrics: Mapping[str, jax.Array], local: Batch
    ) -> dict[str, float]:
        """Take a step that was just started; returns what was logged of the one before, if due."""
        logged = self.watch.settle()  # while this one is under way
        self.watch.expect(step, metrics, self._batches.records)
        parts = self._settings.data.batch_size // len(local["tokens"])  # like this process's
        tokens = int(np.count_nonzero(local["segment_ids"])) * parts
        images = self._batches.images * parts
        samples = sum(map(len, self._batches.records)) * parts
        flops = self._flops(local)
        if step == self._first + 1:  # the meter leaves it out: its work too, not compiling alone
            jax.block_until_ready(metrics)
        self.meter.step(tokens=tokens, images=images, samples=samples, flops=flops)
        return logged

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write and print what an evaluation found while training."""
        self.writer.scalars(step, metrics)
        self.line.print(f"step {step}: {brief(metrics)}")

    def tell_left_out(self) -> None:
        """Print how many samples could not be used, or were left out by their sources' settings."""
        if line := left_out(self._batches.skips)[1]:
            self.line.print(line)

    def _draw(self, step: int, local: Batch) -> None:
        """Draw a batch as the model sees it into the workdir's ``pictures/`` and for writers."""
        processor = self._processor

        def token_text(token: int) -> str:
            text = str(processor.tokenizer.convert_ids_to_tokens(token))
            return text.replace("\u2581", " ")

        # A family whose rows of patches are whole images says how one is drawn.
        own = getattr(processor, "picture", None)
        pixels = draw_batch(local, self._batches.records, token_text, picture=own)
        try:
            save_picture(self._workdir / "pictures" / f"step_{step:07}.png", pixels)
        except OSError as error:
            self.writer.warn(f"the picture of step {step} could not be written: {error}")
        self.writer.picture(step, "data/batch", pixels)


def brief(metrics: Mapping[str, float]) -> str:
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
