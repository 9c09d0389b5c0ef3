"""Why a checkpoint could not be written or read, in one line, and in no more lines than that."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from mmjax.types import MMJaxError

_SHOWN = 200  # letters of what Orbax says, which may list all it knows
_SAVING = ("futures/future.py", "checkpointers/async_checkpointer.py")  # Orbax's threads that save


class _OrbaxLog(logging.Filter):
    """Keep what Orbax logs away, and remember the save that it told of last as failed.

    Of several processes, one whose save has failed waits in Orbax for the others before it raises,
    and they for what it should have written: what it logs is all that tells of it meanwhile. It
    logs other errors too that fail nothing, as an old step that cannot be removed.
    """

    failure: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if "orbax" not in record.pathname:
            return True
        if record.exc_info and record.pathname.endswith(_SAVING):
            self.failure = record.exc_info[1]
        return False


ORBAX_LOG = _OrbaxLog()


def disk_trouble(error: BaseException | None) -> str | None:
    """Return what the disk has to say if it made a save fail, else None."""
    known = ("No space left", "Disk quota exceeded", "File too large", "Input/output error",
             "Read-only file system")  # fmt: skip
    while error is not None:
        for text in known:
            if text in str(error):
                return text
        if isinstance(error, OSError) and error.errno is not None:
            return os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return None


def memory_trouble(error: BaseException | None) -> str | None:
    """Return what to say if a save found no room in the host's memory for its copy, else None."""
    known = ("RESOURCE_EXHAUSTED", "bad_alloc", "ut of memory")  # JAX's, C++'s, and of both cases
    while error is not None:
        if isinstance(error, MemoryError) or any(text in str(error) for text in known):
            return "the host's memory has no room for the copy that is written"
        error = error.__cause__ or error.__context__
    return None


def own_refusal(error: BaseException | None) -> str:
    """Return what we ourselves said where Orbax wraps it, as the data iterator, or nothing."""
    while error is not None:
        if isinstance(error, MMJaxError):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Load within it: of a load that fails the error alone is told, now and later.

    Orbax reads all arrays at a time. Where one cannot be read, or the data iterator refuses, the
    others come to a loop that is closed, or are never awaited, and each would print a traceback.
    """
    tell, log = sys.unraisablehook, logging.getLogger("asyncio")

    def told(unraisable) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            tell(unraisable)

    before, sys.unraisablehook = log.level, told
    log.setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited")
    yield
    sys.unraisablehook = tell
    log.setLevel(before)


@contextlib.contextmanager
def metrics_told(folder: Path) -> Iterator[None]:
    """Open the checkpoints of a folder within it: Orbax reads the metrics of every step then.

    Raises MMJaxError naming the file of those that are damaged.
    """
    try:
        yield
    except ValueError as error:
        for file in sorted(folder.glob("*/metrics/metrics")):
            try:
                json.loads(file.read_bytes())
            except ValueError as why:
                raise MMJaxError(
                    f"{file} is damaged ({why}); remove it: its step then counts as one that was "
                    "never measured, and all else of it is there"
                ) from error
        raise


def first_cause(error: BaseException) -> str:
    """Return the first line of the error behind all that Orbax and others made of it."""
    while (behind := error.__cause__ or error.__context__) is not None:
        error = behind
    return (str(error).strip() or repr(error)).splitlines()[0][:_SHOWN]
