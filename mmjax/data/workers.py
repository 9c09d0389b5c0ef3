"""Data worker processes: their signals, a trainer that is no more, and a death at the start."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time

from absl import flags

_LOOK_EVERY = 1.0  # seconds between looks for the parent process


def prepare_worker(index: int, count: int) -> None:
    """Set up one of ``count`` worker processes; called in it before it reads anything.

    Ctrl-C reaches every process of a terminal's group, and the trainer decides what it means: it
    may go on drawing from this worker while it saves. A trainer that was killed cannot stop its
    workers, so they look for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    # As the trainer told it: one that was killed while this process was starting is gone already.
    trainer = os.getppid() if parent is None else parent.pid
    watcher = threading.Thread(target=_end_with, args=(trainer,), daemon=True)
    watcher.start()


@functools.cache
def tell_of_early_deaths() -> None:
    """Make grain raise, not wait for ever, when a worker dies before it has taken up its state.

    A worker answers when it stands where ``set_state`` wants it. grain 0.2.18 drops what comes
    before that answer, and with it the error by which it tells of the worker's death.
    """
    from grain._src.python.dataset.transformations.process_prefetch import (
        ProcessPrefetchDatasetIterator,
    )

    has_died = ProcessPrefetchDatasetIterator._process_failed

    def process_failed(iterator) -> bool:
        died = has_died(iterator)
        if died:
            iterator._set_state_count = 0  # answers still to come: there will be none
        return died

    ProcessPrefetchDatasetIterator._process_failed = process_failed


def parse_no_flags() -> None:
    """Let grain's absl flags take their defaults where no program has parsed a command line.

    grain 0.2.18 reads one of them whenever it starts a worker, and absl refuses that in a script
    or a notebook that never ran ``absl.app``.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _end_with(parent: int) -> None:
    """End this process when it is no longer the child of ``parent``."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os._exit(1)
