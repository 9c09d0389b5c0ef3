"""Validation loss: the training loss on the right answers of the evaluation's records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from mmjax.data.packing import BatchBuilder, BatchShape, Origin
from mmjax.data.templates import get_template
from mmjax.evals.tasks import Task, answers_of, ask, chosen, open_source
from mmjax.models.api import Processor
from mmjax.parallel.distributed import check_same_arrays
from mmjax.parallel.sharding import process_rows, put_batch
from mmjax.train.loss import loss_by_source
from mmjax.train.settings import RunSettings
from mmjax.types import BadSample, Batch, Message, MMJaxError, Record


class ValidationLoss:
    """Compute ``eval/<task>/loss`` for the tasks of a run, all of them in the same few batches.

    The records are those that ``eval.limit`` picks, laid out by the training template with the
    first right answer, pictures as they are, packed as in training, so there is one compile. What
    fits into no row is left out, and a task of which nothing is left has no loss.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        settings: RunSettings,
        processor: Processor,
        graphdef: nnx.GraphDef,
        mesh: jax.sharding.Mesh,
    ):
        data = settings.data
        self.tasks, self._settings, self._processor = tuple(tasks), settings, processor
        self._shape = BatchShape(data.batch_size, data.seq_len, data.max_patches, data.max_targets)
        self._mesh = mesh
        # A task that is called like a source is laid out as that is.
        named = data.template if isinstance(data.template, dict) else {}
        first = next(iter(named.values()), data.template)
        self._templates = [get_template(named.get(task.name, first)) for task in tasks]

        def sums(params, frozen, batch):
            model = nnx.merge(graphdef, params, frozen)
            return loss_by_source(model, batch, len(tasks), chunk=settings.loss_chunk)

        self._sums = jax.jit(sums)

    def __call__(self, params: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """Return the mean loss over the targets of each task."""
        total = np.zeros((2, len(self.tasks)))
        rows = process_rows(self._mesh, self._shape.rows)
        for batch in self._batches():
            _check_alike(batch)
            local = {name: value[rows] for name, value in batch.items()}
            placed = put_batch(local, self._mesh, self._shape.rows)
            total += np.stack(jax.device_get(self._sums(params, frozen, placed)))
        _check_alike({})  # one that has fewer of them
        return {
            f"eval/{task.name}/loss": float(loss / count)
            for task, loss, count in zip(self.tasks, *total, strict=True)
            if count
        }

    def _batches(self) -> Iterator[Batch]:
        """Yield packed batches; every process packs the same ones."""
        builder = BatchBuilder(self._shape)
        for number, task in enumerate(self.tasks):
            source = open_source(task.source)
            limit = min(self._settings.eval.limit, task.limit or self._settings.eval.limit)
            for index in chosen(source, limit):
                record = _answered(task, source, index)
                if record is None:
                    continue
                try:
                    example = self._processor.encode(
                        self._templates[number](record),
                        record.images,
                        max_tokens=self._shape.seq_len,
                    )
                    self._shape.check(example)
                except BadSample:
                    continue
                example |= {"origin": Origin(number, task.name, str(index))}
                if not builder.try_add(example):
                    yield builder.batch()
                    builder = BatchBuilder(self._shape)
                    builder.try_add(example)
        if builder:
            yield builder.batch()


def _check_alike(batch: Batch) -> None:
    """Raise MMJaxError unless all processes have made the same batch."""
    arrays = (np.asarray(batch[name]) for name in sorted(batch))
    check_same_arrays("some records of the evaluation", arrays)


def _answered(task: Task, source: Sequence[Record], index: int) -> Record | None:
    """Read a record that ends with its answer; None where that has no loss.

    Neither has one of a test split, nor one that cannot be read, asked or answered: the evaluation
    counts it as wrong and tells of it, and a run must not end with it.
    """
    try:
        record = ask(task, source[index])
        return None if record.meta.get("unscored") else with_answer(record)
    except MMJaxError:
        return None


def with_answer(record: Record) -> Record:
    """Return a record that ends with the first of its right answers."""
    if record.messages and record.messages[-1].role == "assistant":
        return record
    answer = Message("assistant", answers_of(record)[0])
    return dataclasses.replace(record, messages=(*record.messages, answer))
