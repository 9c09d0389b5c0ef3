"""Few-shot questions: solved examples before the one that is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmjax.data.turns import IMAGE_MARK, marked
from mmjax.evals.tasks import Task, answers_of, ask, open_source
from mmjax.types import Message, MMJaxError, Record

if TYPE_CHECKING:
    from mmjax.evals.rices import Likeness


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Draws solved examples for each question, as OpenFlamingo's evaluation does.

    source: training records. shots: examples before a question. pool: how many records of the
    source, drawn once, the examples are drawn from (the peer's query set of 2,048); text_only:
    leave their pictures out (the peer shows two such examples where it speaks of zero shots);
    lay_out: puts an example's question into the words of the one that is asked, ``tasks.ask``;
    asked_too: the questions are these very records, so that an index names one without an id.
    likeness: takes those whose pictures are most like the question's in place of drawn ones, out of
    the whole source; the most like one stands next to the question, as in OpenFlamingo's RICES.
    A question's examples are a function of (seed, its index), and never the question itself. One
    whose record does not end with its answer shows the first right one.
    """

    source: Sequence[Record]
    shots: int
    pool: int = 2048
    seed: int = 42
    text_only: bool = False
    lay_out: Callable[[Record], Record] | None = None
    asked_too: bool = False
    likeness: Likeness | None = None

    def __post_init__(self) -> None:
        if len(self.source) <= self.shots:
            raise MMJaxError(
                f"{self.shots} shots need more than the {len(self.source)} records there are to "
                "show; lower shots, or give another source"
            )

    def before(self, record: Record, index: int) -> Record:
        """Return a question with its examples before it, the drawn order kept.

        Raises MMJaxError where fewer than ``shots`` records can be read and have an answer.
        """
        return self.in_orders(record, index, 1)[0]

    def in_orders(self, record: Record, index: int, count: int) -> list[Record]:
        """Return a question behind its examples in so many orders, that of ``before`` first.

        All orders there are where there are fewer; no two are the same. ``meta["examples"]`` are
        the ids of those before it. Raises as ``before`` does.
        """
        examples = self._examples(record, index)
        rng = np.random.default_rng((self.seed, index, 1))
        told = {"examples": [str(one.meta.get("id", "")) for one in examples]}
        record = dataclasses.replace(record, meta={**record.meta, **told})
        return [
            join([*(examples[i] for i in order), record])
            for order in _orders(len(examples), count, rng)
        ]

    def _examples(self, record: Record, index: int) -> list[Record]:
        """Return the examples of a question in their order."""
        own = record.meta.get("id")
        if self.likeness is None:
            places = np.random.default_rng((self.seed, index)).permutation(self._among)
        else:
            places = self.likeness.order(record)
        found = list(itertools.islice(self._others(places, own, index), self.shots))
        if len(found) < self.shots:
            among = len(self._among) if self.likeness is None else len(self.source)
            raise MMJaxError(
                f"{len(found)} of {among} records can be shown before record {own}, and "
                f"{self.shots} are asked for: the rest cannot be read or have no answers; mend the "
                "source of demos, or lower shots"
            )
        return found if self.likeness is None else found[::-1]

    @functools.cached_property
    def _among(self) -> np.ndarray:
        """Return the numbers of the records that examples are drawn from, for all questions."""
        every = np.random.default_rng(self.seed).permutation(len(self.source))
        return every[: max(self.pool, self.shots + 1)].copy()  # a view would keep all of them

    def _others(self, places: Iterable[int], own: str | None, index: int) -> Iterator[Record]:
        """Yield examples by their places, without the question's own and the unreadable."""
        for i in places:
            if self.asked_too and i == index:
                continue
            with contextlib.suppress(MMJaxError):
                record = self.source[int(i)]
                if own is None or record.meta.get("id") != own:
                    yield self._shown(record)

    def _shown(self, record: Record) -> Record:
        if not record.messages or record.messages[-1].role != "assistant":
            answer = Message("assistant", answers_of(record)[0])
            record = dataclasses.replace(record, messages=(*record.messages, answer))
        if self.lay_out is not None:
            record = self.lay_out(record)
        if not self.text_only:
            return record
        messages = tuple(
            dataclasses.replace(m, text=m.text.replace(IMAGE_MARK, "")) for m in record.messages
        )
        return dataclasses.replace(record, messages=messages, images=())


def join(records: Sequence[Record]) -> Record:
    """Return one conversation of several, with the meta of the last."""
    return dataclasses.replace(
        records[-1],
        messages=tuple(m for record in records for m in marked(record)),
        images=tuple(image for record in records for image in record.images),
    )


def _orders(shots: int, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Draw different orders of so many examples, the first of which leaves them as they are."""
    as_they_are = tuple(range(shots))
    if math.factorial(shots) <= count:
        return list(itertools.permutations(as_they_are))
    drawn = {as_they_are: None}
    while len(drawn) < count:
        drawn[tuple(rng.permutation(shots).tolist())] = None
    return list(drawn)


def demonstrations(task: Task) -> Demonstrations | None:
    """Return the examples that stand before a task's questions, drawn ones; None without."""
    if task.demos is None:
        return None
    return Demonstrations(
        open_source(task.demos),
        task.shots or task.text_shots,
        text_only=task.text_shots > 0,
        lay_out=functools.partial(ask, task),
        asked_too=task.demos is task.source,
    )
