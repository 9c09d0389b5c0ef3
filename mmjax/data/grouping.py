"""Batches of one kind: samples with images or of text alone, and of similar lengths.

The alternative to packing where every sample has a row of its own. The shuffled order of draws is
taken a window of batches at a time; its draws are sorted by kind and by words of their raw records
(no image is decoded, nothing tokenised), cut into batches, and the batches are shuffled. Window and
batches are those of all processes together, so that each of them finds the same order by itself.
Kind and words of a record are found once, and kept in four bytes; a source that has ``outlines``
does not read its pictures for them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from mmjax.data.sources import Source
from mmjax.types import BadSample, MMJaxError, Record

WINDOW = 64
"""Batches whose draws are sorted together."""

Draw = tuple[int, int, int]


def check_group(group: str | None, pack: bool, multiturn: object) -> None:
    """Raise MMJaxError for a grouping that is unknown or that other settings leave no sense."""
    if group not in (None, "modality"):
        raise MMJaxError(f"group is {group!r}; choose modality, or None for the shuffled order")
    if group and pack:
        raise MMJaxError(
            f"group={group!r} is for rows of one sample and pack is True; set pack to False, or "
            "group to None: packed rows have little padding as they are"
        )
    if group and multiturn:
        raise MMJaxError(
            f"group={group!r} goes by a record's own kind and length, and multiturn adds others to "
            "it; leave one of them out"
        )


def kind_of(record: Record) -> tuple[bool, int]:
    """Return (has images, words) of a record."""
    return len(record.images) > 0, sum(len(message.text.split()) for message in record.messages)


def arrange(
    kinds: Sequence[tuple[bool, int]], begins: Sequence[int], rows: int, rng: np.random.Generator
) -> np.ndarray:
    """Return int64[draws]: which draw of a window stands at each place, batch behind batch.

    kinds: of each draw, in the shuffled order. begins: where a source begins anew: no draw is moved
    past such a place, so that no record is drawn twice before each was drawn once, and the batch it
    falls into stays as it is. Of both kinds the shortest samples, too few for a batch, share one.
    """
    images, words = (np.array(column) for column in zip(*kinds, strict=True))
    order = np.arange(len(kinds))
    ends = [0, *sorted(begins), len(kinds)]
    for start, stop in itertools.pairwise(ends):
        start, stop = -(-start // rows) * rows, stop // rows * rows
        if stop <= start:
            continue
        inside = np.arange(start, stop)
        inside = inside[np.argsort(words[start:stop], kind="stable")]
        alike = [inside[images[inside] == kind] for kind in (True, False)]
        rest = [some[: len(some) % rows] for some in alike]
        batches = np.concatenate([*(some[len(some) % rows :] for some in alike), *rest])
        order[start:stop] = rng.permutation(batches.reshape(-1, rows)).ravel()
    return order


@dataclasses.dataclass(frozen=True)
class Grouped:
    """The order of draws with its batches grouped: place -> draw.

    draw: place -> (source, record, epoch of the source) in the shuffled order. total: draws there
    are, None without end. rows: of the batch of all ``streams``; each of these has ``workers``, and
    a batch of one worker of every stream makes a step.
    """

    draw: Callable[[int], Draw]
    sources: tuple[Source, ...]
    total: int | None
    seed: int
    rows: int
    streams: int = 1
    workers: int = 1
    _orders: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)
    # Of each source, int32[records]: 2 * words + (has images), -1 for one not looked at yet.
    _known: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)

    def __call__(self, place: int, _: int = 0) -> Draw:
        block = self.rows * self.workers
        if self.total is not None and place >= self.total // block * block:
            return self.draw(place)
        window, at = divmod(self._rank(place), self._window)
        return self.draw(window * self._window + int(self._order(window)[at]))

    @property
    def _window(self) -> int:
        return -(-WINDOW // self.workers) * self.workers * self.rows

    def _rank(self, place: int) -> int:
        """Return a place's number when draws are counted step by step.

        Stream i takes every n-th place, its worker w every so many-th of those, and a batch is as
        many of these as the stream has rows.
        """
        turn, stream = divmod(place, self.streams)
        turn, worker = divmod(turn, self.workers)
        batch, row = divmod(turn, self.rows // self.streams)
        return (batch * self.workers + worker) * self.rows + row * self.streams + stream

    def _order(self, window: int) -> np.ndarray:
        if (order := self._orders.get(window)) is not None:
            return order
        start = window * self._window
        stop = start + self._window
        if self.total is not None:
            block = self.rows * self.workers
            stop = min(stop, self.total // block * block)
        draws = [self.draw(place) for place in range(start, stop)]
        begins, epochs = [], {}
        for i, (source, _, epoch) in enumerate(draws):
            if epochs.setdefault(source, epoch) != epoch:
                begins.append(i)
            epochs[source] = epoch
        rng = np.random.default_rng((self.seed, window))
        order = arrange([self._kind(draw) for draw in draws], begins, self.rows, rng)
        # A copy: threads that read take windows out and put them in at the same time.
        for old in list(self._orders.copy())[:-1]:
            self._orders.pop(old, None)
        self._orders[window] = order
        return order

    def _kind(self, draw: Draw) -> tuple[bool, int]:
        number, index, _ = draw
        source = self.sources[number]
        if number not in self._known:
            self._known[number] = np.full(len(source), -1, np.int32)
        known = self._known[number]
        if known[index] < 0:
            first, found = _outlines(source, index)
            known[first : first + len(found)] = [_code(record) for record in found]
        words, images = divmod(int(known[index]), 2)
        return images > 0, words


def _outlines(source: Source, index: int) -> tuple[int, Sequence[Record | BadSample]]:
    """Return what ``Source`` calls outlines; of a source without them, the record itself."""
    try:
        if (outlines := getattr(source, "outlines", None)) is not None:
            return outlines(index)
        return index, [source[index]]
    except BadSample as error:
        return index, [error]


def _code(record: Record | BadSample) -> int:
    if isinstance(record, BadSample):  # its row stays empty, in whichever batch
        return 0
    images, words = kind_of(record)
    return 2 * words + images
