"""The training pipeline: from sources to packed batches, seeded, sharded, exactly resumable.

Records are drawn by number: shuffle, repeat, mix and shard work on (source, record, epoch), and a
record is only read, laid out by its template and encoded by its processor in the worker that packs
it. Everything random is a function of (seed, source, record, epoch). The iterator's state says
where each worker stands; the next batch after ``set_state`` is the very next one.

This module and ``mmjax.data.iterator`` alone import grain (which imports jax where it finds it,
without starting a device); the rest of ``mmjax.data`` is numpy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mmjax.data.iterator import PackDataset, TrainIterator
from mmjax.data.mixture import Mixture, Weights
from mmjax.data.packing import BatchShape, Origin
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
from mmjax.data.workers import parse_no_flags, prepare_worker, tell_of_early_deaths
from mmjax.types import BadSample, Example, MMJaxError, Record

_SMALL = 4096  # records up to which a source's order is a table


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
    weights: Weights | None = None,
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
    epochs: of the mixture (None: for ever). resolutions: longest sides to
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
    load = make_loader(mixture, template, processor, shape, seed, resolutions, legacy_otter)
    sides = load.resolutions
    draws = draw_records(mixture, seed, epochs)[process_index::process_count]
    reading = grain.ReadOptions(
        num_threads=read_threads, prefetch_buffer_size=4 * read_threads if read_threads else 0
    )
    dataset = draws.map(load).to_iter_dataset(reading)
    dataset = PackDataset(dataset, shape, None if pack else 1)
    if num_workers:
        parse_no_flags()
        tell_of_early_deaths()
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=max(1, prefetch))
        dataset = dataset.mp_prefetch(options, prepare_worker)
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
    skips = SkipLog(path, max_bad_share, min_bad_samples)
    return TrainIterator(dataset, skips, fixed, mixture.names)


def make_loader(
    mixture: Mixture,
    template: str | Template,
    processor: Any,
    shape: BatchShape,
    seed: int = 0,
    resolutions: Resolutions | None = None,
    legacy_otter: bool = False,
) -> LoadExample:
    """Make what turns a draw into an example; arguments as in ``make_train_iterator``."""
    sides = list_resolutions(resolutions)
    lay_out, resize = get_template(template), at_resolution
    if legacy_otter:
        lay_out, resize = legacy_loading(lay_out, sides)
    return LoadExample(mixture, lay_out, processor, shape, seed, sides, resize)


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
        order = int(np.random.SeedSequence([seed, number]).generate_state(1)[0] % (2**31))
        orders.append(_Order(order, len(source)))
    draw = _Draw(mixture, tuple(orders))
    return grain.MapDataset.range(mixture.epoch).repeat(epochs).map_with_index(draw)


class _Order:
    """The shuffled order of a source, for ever: ``order[place] -> (record, epoch)``.

    Every epoch is a permutation of its own, so a source is gone through whole before it begins
    again. Large sources are shuffled by grain, which keeps no table; it walks through numbers up to
    65,536 at least, which is milliseconds a draw for a handful of records, so small ones have one.
    """

    def __init__(self, seed: int, length: int):
        self.seed, self.length = seed, length
        self.shuffled = None
        if length > _SMALL:
            self.shuffled = grain.MapDataset.range(length).seed(seed).shuffle().repeat()

    def __getitem__(self, place: int) -> tuple[int, int]:
        epoch, within = divmod(place, self.length)
        if self.shuffled is not None:
            return int(self.shuffled[place]), epoch
        return int(_permutation(self.seed, epoch, self.length)[within]), epoch


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return int32[length], the order of one epoch of a small source."""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(length, dtype=np.int32))


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Turn a place in the mixture into (source, record, epoch of the source)."""

    mixture: Mixture
    orders: tuple[_Order, ...]

    def __call__(self, place: int, _: int) -> tuple[int, int, int]:
        source, place = self.mixture.pick(place)
        return source, *self.orders[source][place]


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
        name = str(record.meta.get("id", index))
        origin = Origin(source, self.mixture.names[source], name, len(record.images))
        return {**example, "origin": origin}
