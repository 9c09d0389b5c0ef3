"""The training pipeline: from sources to packed batches, seeded, sharded, exactly resumable.

Records are drawn by number: shuffle, repeat, mix and shard work on (source, record, epoch), and a
record is only read, laid out and encoded (``mmjax.data.examples``) in the worker that packs it.
Everything random is a function of (seed, source, record, epoch). The iterator's state says
where each worker stands; the next batch after ``set_state`` is the very next one.

This module and ``mmjax.data.iterator`` alone import grain (which imports jax where it finds it,
without starting a device); the rest of ``mmjax.data`` is numpy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mmjax.data.examples import RecordOptions, make_loader
from mmjax.data.grouping import Grouped, check_group
from mmjax.data.iterator import PackDataset, RowDataset, TrainIterator
from mmjax.data.mixture import Mixture, Weights
from mmjax.data.packing import BatchShape
from mmjax.data.skips import SkipLog
from mmjax.data.sources import Source
from mmjax.data.templates import Template
from mmjax.data.workers import parse_no_flags, prepare_worker, tell_of_early_deaths
from mmjax.types import MMJaxError

_SMALL = 4096  # records up to which a source's order is a table


def make_train_iterator(
    sources: Source | Sequence[Source] | Mapping[str, Source] | Mixture,
    template: str | Template | Mapping[str, str | Template],
    processor: Any,
    *,
    seq_len: int,
    max_patches: int,
    max_targets: int,
    batch_size: int,
    seed: int = 0,
    weights: Weights | None = None,
    epochs: int | None = None,
    pack: bool = True,
    group: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    read_threads: int = 0,
    prefetch: int = 2,
    max_bad_share: float = 0.05,
    min_bad_samples: int = 100,
    workdir: str | Path | None = None,
    **options: Any,
) -> TrainIterator:
    """Make the iterator over this process's training batches (see ``Batch`` in mmjax/types.py).

    template: a name or a function, or one for each source by its name; processor: has
    ``encode(segments, images, max_tokens=)``. seq_len, max_patches, max_targets: what one row
    holds; batch_size: rows of this process. epochs: of the mixture (None: for ever). pack: False
    gives every sample its own row; group="modality" then makes batches of one kind, see
    ``mmjax.data.grouping``. num_workers: processes that read and pack, each its own batches;
    0 packs in this process. read_threads: threads a worker reads with (for slow disks). prefetch:
    batches made ahead, by every worker, or by a thread where there are none. max_bad_share,
    min_bad_samples: see ``SkipLog``; workdir: where ``skipped.jsonl`` is written. options: those of
    ``mmjax.data.examples.RecordOptions``, such as ``resolutions=(448, 512)``. The iterator has
    ``get_state`` and ``set_state`` and is an Orbax checkpointable; ``.skips`` holds the counts.
    """
    _check(process_index, process_count, num_workers, epochs)
    mixture = Mixture.of(sources, weights)
    shape = BatchShape(batch_size, seq_len, max_patches, max_targets)
    prepare = RecordOptions(**options)
    check_group(group, pack, prepare.multiturn)
    load = make_loader(mixture, template, processor, shape, seed, prepare)
    batches = dict(
        rows=batch_size * process_count, streams=process_count, workers=max(1, num_workers)
    )
    draws = draw_records(mixture, seed, epochs, **(batches if group else {}))
    samples = _read(draws[process_index::process_count].map(load), read_threads)
    made = RowDataset(samples, shape) if group else PackDataset(samples, shape, None if pack else 1)
    suffix = f".{process_index}" if process_count > 1 else ""
    path = None if workdir is None else Path(workdir) / f"skipped{suffix}.jsonl"
    fixed = {
        "seed": int(seed),  # JSON knows no integers of numpy
        "num_workers": num_workers,
        "process_index": process_index,
        "process_count": process_count,
        "epochs": epochs,
        "pack": pack,
        "group": group,
        "shape": list(map(int, dataclasses.astuple(shape))),
        **prepare.facts(),
        "sources": _sizes(mixture),
    }
    skips = SkipLog(path, max_bad_share, min_bad_samples)
    return TrainIterator(_ahead(made, num_workers, prefetch), skips, fixed, mixture.names)


def draw_records(
    mixture: Mixture, seed: int, epochs: int | None = None, **batches: int
) -> grain.MapDataset:
    """Return the dataset of draws (source, record, epoch of the source), mixed and shuffled.

    epochs: of the mixture, each of exactly ``mixture.counts`` draws; None goes on for ever.
    batches: where they are grouped, ``rows``, ``streams`` and ``workers`` of ``Grouped``.
    """
    orders = []
    for number, source in enumerate(mixture.sources):
        order = int(np.random.SeedSequence([seed, number]).generate_state(1)[0] % (2**31))
        orders.append(_Order(order, len(source)))
    draw = _Draw(mixture, tuple(orders))
    if batches:
        total = None if epochs is None else epochs * mixture.epoch
        draw = Grouped(draw, mixture.sources, total, seed, **batches)
    return grain.MapDataset.range(mixture.epoch).repeat(epochs).map_with_index(draw)


def _check(process_index: int, process_count: int, num_workers: int, epochs: int | None) -> None:
    """Raise MMJaxError for numbers that no pipeline has."""
    if not 0 <= process_index < process_count:
        raise MMJaxError(f"process_index {process_index} of process_count {process_count}")
    if num_workers < 0:
        raise MMJaxError(f"num_workers is {num_workers}; give 0 to read and pack in this process")
    if epochs is not None and epochs < 1:
        raise MMJaxError(f"epochs is {epochs}; give 1 or more, or None to go on for ever")


def _read(samples: grain.MapDataset, threads: int) -> grain.IterDataset:
    """Make the samples one after another, or so many at once in threads, in the same order."""
    ahead = 4 * threads if threads else 0
    return samples.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )


def _ahead(made: grain.IterDataset, num_workers: int, prefetch: int) -> grain.IterDataset:
    """Make batches in worker processes, or by a thread ahead of the one that asks for them."""
    if num_workers:
        parse_no_flags()
        tell_of_early_deaths()
        ahead = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=max(1, prefetch))
        return made.mp_prefetch(ahead, prepare_worker)
    if prefetch:
        return grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=prefetch)
    return made


def _sizes(mixture: Mixture) -> dict[str, list[int]]:
    """Return (records, draws of an epoch) of each source by its name."""
    every = zip(mixture.names, mixture.sources, mixture.counts, strict=True)
    return {name: [len(source), count] for name, source, count in every}


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

    def __call__(self, place: int, _: int = 0) -> tuple[int, int, int]:
        source, place = self.mixture.pick(place)
        return source, *self.orders[source][place]
