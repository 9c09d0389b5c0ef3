"""Examples into batches, one after another: the iterators behind ``mmjax.data.pipeline``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from mmjax.data.packing import BatchBuilder, BatchShape, empty_batch
from mmjax.data.skips import Skip, SkipLog
from mmjax.types import Batch, Example, MMJaxError

_FLUSH = 256  # bad samples after which a batch goes out, however full, to have them counted
_LOOKAHEAD = 8  # samples set aside for the next batch before this one counts as full
_RESTARTS = 3  # deaths of data workers without a batch in between that end the run
_WORKER_DIED = "terminated unexpectedly"  # in the message of grain's RuntimeError


class PackDataset(grain.IterDataset):
    """Pack a stream of examples and skips into batches.

    Yields ``{"batch": Batch, "origins": rows of Origin, "seen": n, "skips": (...)}``; without the
    first two when nothing but bad samples came for a while, or at the end.
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
        return {**item, "batch": builder.batch(), "origins": builder.origins} if builder else item

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


class RowDataset(grain.IterDataset):
    """Give every sample of a stream a row, in order; the row of a skip stays empty.

    A batch is so many draws, whatever became of them: batches that were put together by their
    draws stay together. Yields what ``PackDataset`` does.
    """

    def __init__(self, parent: grain.IterDataset, shape: BatchShape):
        super().__init__(parent)
        self._shape = shape

    def __iter__(self) -> grain.DatasetIterator:
        return _RowIterator(iter(self._parent), self._shape)


class _RowIterator(grain.DatasetIterator):
    """The state is that of the parent, and what patches are like once an example told."""

    def __init__(self, parent, shape: BatchShape):
        super().__init__(parent)
        self._shape = shape
        self._patches: np.ndarray | None = None  # [0, pixels]: their width and dtype

    def __next__(self) -> dict[str, Any]:
        builder = BatchBuilder(self._shape, 1)
        skips: list[Skip] = []
        seen = 0
        for row, sample in zip(range(self._shape.rows), self._parent, strict=False):
            seen += 1
            if isinstance(sample, Skip):
                skips.append(sample)
            else:
                builder.add(sample, row)
                self._patches = sample["patches"][:0]
        if not seen:
            raise StopIteration
        item = {"seen": seen, "skips": tuple(skips)}
        if builder:
            return {**item, "batch": builder.batch(), "origins": builder.origins}
        if self._patches is None:
            self._look_ahead()
        if self._patches is None:
            return item
        return {
            **item,
            "batch": empty_batch(self._shape, self._patches),
            "origins": builder.origins,
        }

    def _look_ahead(self) -> None:
        """Find an example to learn what patches are like; the stream stands where it stood."""
        state = self._parent.get_state()
        for _, sample in zip(range(_FLUSH), self._parent, strict=False):
            if not isinstance(sample, Skip):
                self._patches = sample["patches"][:0]
                break
        self._parent.set_state(state)

    def get_state(self) -> dict[str, Any]:
        like = self._patches
        told = None if like is None else [like.shape[-1], like.dtype.name]
        return {"parent": self._parent.get_state(), "patches": told}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        told = state.get("patches")  # not in states of earlier versions
        self._patches = None if told is None else np.zeros((0, told[0]), told[1])


class TrainIterator(grain.DatasetIterator):
    """Yield batches; count, list and limit the bad samples that were met on the way.

    records: (source, record id) of what stands in each row of the last batch. images: how many
    images it holds. source_names: of the numbers in ``target_source``. warn: called with a line
    when a data worker has died and was started again.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        skips: SkipLog,
        fixed: dict[str, Any],
        source_names: Sequence[str] = (),
    ):
        super().__init__(iter(dataset))
        self._dataset = dataset
        self.skips = skips
        self.source_names = tuple(source_names)
        self.records: list[list[tuple[str, str]]] = []
        self.images = 0
        self.warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
        self._fixed = fixed

    def __next__(self) -> Batch:
        while True:
            try:
                item = self._next_item()
            except StopIteration:
                self.skips.finish()
                raise
            self.skips.add(item["seen"], item["skips"])
            if "batch" in item:
                origins = item["origins"]
                self.records = [[(o.name, o.id) for o in row] for row in origins]
                self.images = sum(o.images for row in origins for o in row)
                return item["batch"]

    def _next_item(self) -> dict[str, Any]:
        """Return the next item; a data worker that was killed is started again where it stood.

        What a worker raises comes through as it is, with the worker's traceback.
        """
        for deaths in range(_RESTARTS + 1):
            try:
                return next(self._parent)
            except RuntimeError as error:
                if _WORKER_DIED not in str(error):
                    raise
                if deaths == _RESTARTS:
                    raise MMJaxError(
                        f"a data worker died {deaths + 1} times without making a batch: {error} "
                        "Exit code -9 is SIGKILL, most often for want of memory: lower "
                        "data.workers, or look at the records it was reading with data.workers=0"
                    ) from error
                self.warn(f"a data worker died and is started again: {error}")
                state, dead = self._parent.get_state(), self._parent
                fresh = iter(self._dataset)
                fresh.set_state(state)
                self._parents = (fresh,)
                dead.close()
        raise AssertionError("unreachable")

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
        was = state["fixed"]
        changed = [
            f"{key} was {was.get(key)!r} and is {value!r}"
            for key, value in self._fixed.items()
            if key != "sources" and was.get(key) != value
        ]
        sources = [some.get("sources") or {} for some in (was, self._fixed)]
        changed += _changed_sources(*sources)
        names = [list(some) for some in sources]
        if not changed and names[0] != names[1]:  # draws go by a source's number
            old, new = (", ".join(some) for some in names)
            changed = [f"the order of the sources was {old} and is {new}"]
        if changed:
            raise MMJaxError(
                f"the saved data position belongs to other options: {'; '.join(changed)}. Restore "
                "them, or start a new workdir"
            )
        self._parent.set_state(state["parent"])
        self.skips.restore(state["skips"])


def _changed_sources(
    was: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]
) -> list[str]:
    """Say which sources differ; each is (records, draws of an epoch) by its name."""
    lines = [f"source {name!r} was not there" for name in now if name not in was]
    lines += [f"source {name!r} is no longer there" for name in was if name not in now]
    for name in (name for name in now if name in was):
        (records, draws), (records_now, draws_now) = was[name], now[name]
        if records != records_now:
            lines.append(f"source {name!r} had {records:,} records and has {records_now:,}")
        elif draws != draws_now:
            lines.append(
                f"an epoch drew {draws:,} times from source {name!r} and draws {draws_now:,} times"
            )
    return lines
