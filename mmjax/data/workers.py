"""What a data worker process does about signals, and about a trainer that is no more."""

from __future__ import annotations

import os
import signal
import threading
import time

_LOOK_EVERY = 1.0  # seconds between looks for the parent process


def prepare_worker(index: int, count: int) -> None:
    """Set up one of ``count`` worker processes; called in it before it reads anything.

    Ctrl-C reaches every process of a terminal's group, and the trainer decides what it means: it
    may go on drawing from this worker while it saves. A trainer that was killed cannot stop its
    workers, so they look for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watcher = threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True)
    watcher.start()


def _end_with(parent: int) -> None:
    """End this process when it is no longer the child of ``parent``."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os._exit(1)
