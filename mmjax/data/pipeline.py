"""The training pipeline: from sources to packed batches, seeded, sharded, exactly resumable.

Records are drawn by number: shuffle, repeat, mix and shard work on (source, record, epoch), and a
record is only read, laid out by its template and encoded by its processor in the worker that packs
it. Everything random is a function of (seed, source, record, epoch). The iterator's state says
where each worker stands; the next batch after ``set_state`` is the very next one.

This module alone imports grain (which imports jax where it finds it, without starting a device);
the rest of ``mmjax.data`` is numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mmjax.data.mixture import Mixture
from mmjax.data.packing import BatchBuilder, BatchShape
from mmjax.data.resizing import (
    Resolutions,
    at_resolution,
    draw_resolution,
    list_resolutions,
    squash_first,
)
from mmjax.data.skips import Skip, SkipLog
from mmjax.data.sources import Source
from mmjax.data.templates import Template, fuyu_chat, fuyu_legacy_otter, get_template
from mmjax.types import BadSample, Batch, Example, MMJaxError, Record

_FLUSH = 256  # bad samples after which a batch goes out, however full, to have them counted
_LOOKAHEAD = 8  # samples set aside for the next batch before this one counts as full


def make_train_iterator(
    sources: Source | Sequence[Source] | Mapping[str, Source] | Mixture,
    template: str | Template,
    processor: Any,
    *,
    seq_len: int,
    max_patches: int,
    max_targets: int,
    batch_size: int,
    seed: int = 0,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    epochs: int | None = None,
    resolutions: Resolutions | None = None,
    legacy_otter: bool = False,
    pack: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    read_threads: int = 0,
    prefetch: int = 2,
    max_bad_share: float = 0.05,
    min_bad_samples: int = 100,
    workdir: str | Path | None = None,
) -> TrainIterator:
    """Make the iterator over this process's training batches (see ``Batch`` in mmjax/types.py).

    template: a name or a function; processor: has ``encode(segments, images, max_tokens=)``.
    seq_len, max_patches, max_targets: what one row holds; batch_size: rows of this process.
    epochs: how often each source is gone through (None: for ever). resolutions: longest sides to
    draw from for each sample (images are only reduced). legacy_otter: OtterHD's own way, which
    ``legacy_loading`` describes. pack: False gives every sample its own
    row. num_workers: processes that read and pack, each its own batches; 0 packs in this process.
    read_threads: threads a worker reads with (for slow disks). prefetch: batches made ahead, by
    every worker, or by a thread where there are none. max_bad_share, min_bad_samples: see
    ``SkipLog``; workdir: where ``skipped.jsonl`` is written. The iterator has ``get_state`` and
    ``set_state`` and is an Orbax checkpointable; ``.skips`` holds the counts.
    """
    if not 0 <= process_index < process_count:
        raise MMJaxError(f"process_index {process_index} of process_count {process_count}")
    mixture = Mixture.of(sources, weights)
    shape = BatchShape(batch_size, seq_len, max_patches, max_targets)
    sides = list_resolutions(resolutions)
    lay_out, resize = get_template(template), at_resolution
    if legacy_otter:
        lay_out, resize = legacy_loading(lay_out, sides)
    load = LoadExample(mixture, lay_out, processor, shape, seed, sides, resize)
    draws = draw_records(mixture, seed, epochs)[process_index::process_count]
    reading = grain.ReadOptions(
        num_threads=read_threads, prefetch_buffer_size=4 * read_threads if read_threads else 0
    )
    dataset = draws.map(load).to_iter_dataset(reading)
    dataset = PackDataset(dataset, shape, None if pack else 1)
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=max(1, prefetch))
        dataset = dataset.mp_prefetch(options)
    elif prefetch:
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=prefetch
        )
    suffix = f".{process_index}" if process_count > 1 else ""
    path = None if workdir is None else Path(workdir) / f"skipped{suffix}.jsonl"
    fixed = {
        "seed": seed,
        "num_workers": num_workers,
        "process_index": process_index,
        "process_count": process_count,
        "epochs": epochs,
        "pack": pack,
        "shape": list(dataclasses.astuple(shape)),
        "resolutions": None if sides is None else list(sides),
        "legacy_otter": legacy_otter,
        "sources": {
            name: [len(source), count]
            for name, source, count in zip(
                mixture.names, mixture.sources, mixture.counts, strict=True
            )
        },
    }
    return TrainIterator(iter(dataset), SkipLog(path, max_bad_share, min_bad_samples), fixed)


def legacy_loading(
    template: Template, resolutions: tuple[int | None, ...] | None
) -> tuple[Template, Callable[[Record, int], Record]]:
    """Return the template and the resizing of OtterHD's own code, behind ``legacy_otter``.

    ``templates.fuyu_legacy_otter`` and ``resizing.squash_first`` say what they do and why. Raises
    MMJaxError where another template is asked for, or a size that is no square's.
    """
    if template is not fuyu_chat:
        raise MMJaxError(
            f"legacy_otter reproduces OtterHD's training, whose template is 'fuyu_chat', not "
            f"{getattr(template, '__name__', template)!r}; set template to it, or legacy_otter to "
            "False"
        )
    if not resolutions or None in resolutions:
        raise MMJaxError(
            f"legacy_otter squashes every picture to a square, and resolutions is {resolutions}; "
            "give its sides, such as (448, 512, 768)"
        )
    return fuyu_legacy_otter, squash_first


def draw_records(mixture: Mixture, seed: int, epochs: int | None = None) -> grain.MapDataset:
    """Return the dataset of draws (source, record, epoch of the source), mixed and shuffled.

    epochs: of the mixture, each of exactly ``mixture.counts`` draws; None goes on for ever.
    """
    orders = []
    for number, source in enumerate(mixture.sources):
        order = np.random.SeedSequence([seed, number]).generate_state(1)[0] % (2**31)
        # Repeating shuffles anew, so a source is gone through whole before it begins again.
        orders.append(grain.MapDataset.range(len(source)).seed(int(order)).shuffle().repeat())
    draw = _Draw(mixture, tuple(orders))
    return grain.MapDataset.range(mixture.epoch).repeat(epochs).map_with_index(draw)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Turn a place in the mixture into (source, record, epoch of the source)."""

    mixture: Mixture
    orders: tuple[grain.MapDataset, ...]

    def __call__(self, place: int, _: int) -> tuple[int, int, int]:
        source, place = self.mixture.pick(place)
        return source, int(self.orders[source][place]), place // len(self.mixture.sources[source])


@dataclasses.dataclass(frozen=True)
class LoadExample:
    """Read a drawn record and make its example; a bad sample becomes a Skip, and travels on."""

    mixture: Mixture
    template: Template
    processor: Any
    shape: BatchShape
    seed: int
    resolutions: tuple[int | None, ...] | None = None  # of ``list_resolutions``
    resize: Callable[[Record, int | None], Record] = at_resolution

    def __call__(self, draw: tuple[int, int, int]) -> Example | Skip:
        source, index, epoch = draw
        record = None
        try:
            record = self.mixture.sources[source][index]
            if self.resolutions:
                rng = np.random.default_rng((self.seed, source, index, epoch))
                record = self.resize(record, draw_resolution(self.resolutions, rng))
            segments = self.template(record)
            example = self.processor.encode(segments, record.images, max_tokens=self.shape.seq_len)
            self.shape.check(example)
        except BadSample as error:
            meta = record.meta if record is not None else None
            return Skip.of(error, self.mixture.names[source], index, meta)
        return example


class PackDataset(grain.IterDataset):
    """Pack a stream of examples and skips into batches.

    Yields ``{"batch": Batch, "seen": n, "skips": (...)}``; without ``batch`` when nothing but bad
    samples came for a while, or at the end.
    """

    def __init__(self, parent: grain.IterDataset, shape: BatchShape, samples_per_row: int | None):
        super().__init__(parent)
        self._shape, self._samples_per_row = shape, samples_per_row

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(iter(self._parent), self._shape, self._samples_per_row)


class _PackIterator(grain.DatasetIterator):
    """Fill batch after batch, setting aside what does not fit for the next one.

    The state is where the oldest sample set aside stood in the parent, and which of the samples
    from there on were used already: no example is ever written into a checkpoint.
    """

    def __init__(self, parent, shape: BatchShape, samples_per_row: int | None):
        super().__init__(parent)
        self._shape, self._samples_per_row = shape, samples_per_row
        self._restart(parent.get_state(), [], 0)

    def _restart(self, origin: Any, used: list[int], replay: int) -> None:
        # A place counts the samples pulled since the iterator stood at ``origin``.
        self._origin, self._origin_place, self._place = origin, 0, 0
        self._used = set(used)  # places at or behind the origin that are in batches already
        self._replay = replay  # places below it were counted as seen before
        self._waiting: list[tuple[int, Any, Example]] = []  # (place, state before it, example)

    def __next__(self) -> dict[str, Any]:
        builder = BatchBuilder(self._shape, self._samples_per_row)
        skips: list[Skip] = []
        seen = 0
        ended = False
        self._waiting = [w for w in self._waiting if not self._take(builder, w[0], w[2])]
        while len(self._waiting) < _LOOKAHEAD and len(skips) < _FLUSH:
            before = self._parent.get_state()
            try:
                sample = next(self._parent)
            except StopIteration:
                ended = True
                break
            place = self._place
            self._place += 1
            if place in self._used:
                continue
            seen += place >= self._replay
            if isinstance(sample, Skip):
                self._used.add(place)
                if place >= self._replay:
                    skips.append(sample)
            elif not self._take(builder, place, sample):
                self._waiting.append((place, before, sample))
        self._settle()
        if ended and not builder and not seen:
            raise StopIteration
        item = {"seen": seen, "skips": tuple(skips)}
        return {**item, "batch": builder.batch()} if builder else item

    def get_state(self) -> dict[str, Any]:
        used = sorted(p - self._origin_place for p in self._used)
        replay = max(self._place, self._replay) - self._origin_place
        return {"parent": self._origin, "used": used, "replay": replay}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._restart(state["parent"], state["used"], state["replay"])

    def _take(self, builder: BatchBuilder, place: int, example: Example) -> bool:
        if not builder.try_add(example):
            return False
        self._used.add(place)
        return True

    def _settle(self) -> None:
        """Move the origin up to the oldest sample still waiting."""
        if self._waiting:
            self._origin_place, self._origin = self._waiting[0][:2]
        else:
            self._origin_place, self._origin = self._place, self._parent.get_state()
        self._used = {p for p in self._used if p >= self._origin_place}


class TrainIterator(grain.DatasetIterator):
    """Yield batches; count, list and limit the bad samples that were met on the way."""

    def __init__(self, parent: grain.DatasetIterator, skips: SkipLog, fixed: dict[str, Any]):
        super().__init__(parent)
        self.skips = skips
        self._fixed = fixed

    def __next__(self) -> Batch:
        while True:
            try:
                item = next(self._parent)
            except StopIteration:
                self.skips.finish()
                raise
            self.skips.add(item["seen"], item["skips"])
            if "batch" in item:
                return item["batch"]

    def get_state(self) -> dict[str, Any]:
        """Return a JSON-able state: where to go on, the counts, and what must not change."""
        return {
            "parent": self._parent.get_state(),
            "skips": self.skips.state(),
            "fixed": self._fixed,
            "grain": grain.__version__,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which ``state`` was taken.

        Raises MMJaxError naming the option if the pipeline was made with other options.
        """
        changed = [
            f"{key} was {state['fixed'].get(key)!r} and is {value!r}"
            for key, value in self._fixed.items()
            if state["fixed"].get(key) != value
        ]
        if changed:
            raise MMJaxError(
                f"the saved data position belongs to other options: {'; '.join(changed)}. Restore "
                "them, or start a new workdir"
            )
        self._parent.set_state(state["parent"])
        self.skips.restore(state["skips"])
