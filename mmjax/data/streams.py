"""Streams: the rows of a global batch, shared out so that they do not depend on the processes.

A batch of b rows is filled by n streams, each packing every n-th record of the global order into
its own b / n rows. A process makes the streams whose rows its devices hold, and reads nothing else.
With the same number of streams every step has the same rows, however many processes there are, and
a checkpoint, which holds a position for each stream, goes on with any number of them.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.types import Batch, MMJaxError


def share_streams(rows: Sequence[int], batch_size: int, streams: int = 0) -> tuple[list[int], int]:
    """Return which streams a process makes, and how many there are in all.

    rows: of the global batch, those that this process's devices hold. streams: 0 for as many as
    there are different shares of rows, which is one for each process.
    Raises MMJaxError when streams do not divide the batch, or a process would need part of one.
    """
    streams = streams or batch_size // len(rows)
    if batch_size % streams:
        raise MMJaxError(
            f"data.batch_size {batch_size} does not divide into data.streams {streams}; choose a "
            f"multiple of {streams}"
        )
    each = batch_size // streams
    mine = sorted({row // each for row in rows})
    if len(mine) * each != len(rows):
        raise MMJaxError(
            f"data.streams {streams} fill {each} rows each and this process holds {len(rows)} of "
            f"{batch_size}: no stream can be shared between processes; set data.streams to a "
            f"multiple of {batch_size // len(rows)}"
        )
    return mine, streams


class Streams:
    """The streams of one process as one iterator; their rows stand one below the other.

    streams: number -> iterator over its batches, as ``make_train_iterator`` makes it. count: of
    all processes. An Orbax checkpointable: one file for each stream. records, images: see
    ``TrainIterator``.
    """

    def __init__(self, streams: Mapping[int, Any], count: int):
        self._streams, self._count = dict(sorted(streams.items())), count

    def __iter__(self) -> Streams:
        return self

    def __next__(self) -> Batch:
        parts = [next(stream) for stream in self._streams.values()]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the numbers in ``target_source``."""
        return next(iter(self._streams.values())).source_names

    @property
    def records(self) -> list[list[tuple[str, str]]]:
        """(source, record id) of what stands in each row of the last batch."""
        return [row for stream in self._streams.values() for row in stream.records]

    @property
    def images(self) -> int:
        """Images in the last batch."""
        return sum(stream.images for stream in self._streams.values())

    @property
    def skips(self) -> list[Any]:
        """The ``SkipLog`` of each stream."""
        return [stream.skips for stream in self._streams.values()]

    @property
    def warn(self) -> Callable[[str], None]:
        """What is called with a line when a data worker was started again."""
        return next(iter(self._streams.values())).warn

    @warn.setter
    def warn(self, warn: Callable[[str], None]) -> None:
        for stream in self._streams.values():
            stream.warn = warn

    def close(self) -> None:
        """End the data workers."""
        for stream in self._streams.values():
            stream.close()

    def get_state(self) -> dict[str, Any]:
        """Return where each stream stands, JSON-able, by the name of its file."""
        return {self._file(number): s.get_state() for number, s in self._streams.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where the streams stood; raises MMJaxError when there were others."""
        for number, stream in self._streams.items():
            if self._file(number) not in state:
                raise self._other(state)
            stream.set_state(state[self._file(number)])

    async def save(self, directory: Any):
        """Write the state as it is now; Orbax awaits what this returns in the background."""
        texts = {name: json.dumps(state) for name, state in self.get_state().items()}

        async def write() -> None:
            folder = await directory.await_creation()
            for name, text in texts.items():
                # Processes that share rows write the same file with the same content; on other
                # hosts, in containers above all, their ids may be the same.
                part = folder / f"{name}.{uuid.uuid4().hex}"
                await asyncio.to_thread(part.write_text, text)
                await asyncio.to_thread(part.replace, folder / name)

        return write()

    async def load(self, directory: Any):
        """Read the state of this process's streams, whichever process wrote it.

        Raises MMJaxError when there were others, and FileNotFoundError where a file is lost.
        """

        async def read() -> None:
            names = [path.name for path in directory.iterdir()]
            state = {}
            for name in map(self._file, self._streams):
                if name not in names and _counts(names) <= {str(self._count)}:
                    raise FileNotFoundError(f"{directory}: no {name}")
                if name not in names:
                    raise self._other(names)
                state[name] = json.loads(await asyncio.to_thread((directory / name).read_text))
            self.set_state(state)

        return read()

    def _file(self, number: int) -> str:
        return f"stream_{number}-of-{self._count}.json"

    def _other(self, names) -> MMJaxError:
        saved = " or ".join(sorted(_counts(names))) or "no"
        return MMJaxError(
            f"the saved data position is of {saved} stream(s) and this run has {self._count}; set "
            "config.data.streams to what it was, or start a new workdir"
        )


def _counts(names) -> set[str]:
    """Return of how many streams files are, as their names say it."""
    return {n.removesuffix(".json").rpartition("-of-")[2] for n in names if "-of-" in n}
