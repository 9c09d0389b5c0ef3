"""Whether the processes of a run can meet: the first one's port is free, the others reach it.

JAX lets the coordinators of two runs share a port, which ends both; and a process that reaches none
is ended in C++ without the reason.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from mmjax.types import MMJaxError

REACH_SECONDS = 300  # in which the first process has to answer; a pod's name may come late
JOIN_SECONDS = 300  # in which all of them have to be there
_NOTICE_SECONDS = 20  # after which a process says that it waits
_PAUSE = 0.5


def check_free(coordinator: str) -> None:
    """Raise MMJaxError if the port of ``coordinator`` (host:port) is taken on this host."""
    port = _parts(coordinator)[1]
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return  # JAX says what it is
        raise MMJaxError(
            f"port {port}, where the processes of this run are to meet, cannot be had on this "
            f"host: {error.strerror}. Another run may have it: wait until that has ended, or give "
            "all processes another one with JAX_COORDINATOR_ADDRESS=host:port"
        ) from error


def wait_for(coordinator: str, seconds: float = REACH_SECONDS) -> None:
    """Wait until something listens at ``coordinator``; raises MMJaxError after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(_parts(coordinator), timeout=max(1, seconds / 10)).close()
            return
        except OSError as error:
            if time.monotonic() + _PAUSE > until:
                raise MMJaxError(
                    f"process 0 was not reached at {coordinator} within {seconds:g} s: "
                    f"{error.strerror or error}. See whether it was started and what it says, "
                    "whether this host knows that name, and whether a firewall is between them; "
                    "JAX_COORDINATOR_ADDRESS=host:port in all processes names another place"
                ) from error
        time.sleep(_PAUSE)


@contextlib.contextmanager
def all_expected(index: int, count: int) -> Iterator[None]:
    """Tell of processes that do not come while a block waits for all ``count`` of them.

    After ``JOIN_SECONDS`` this process, number ``index``, ends with exit code 2. JAX, told to wait
    longer, would end it in C++ without saying what was missing.
    """
    who = f"process {index} of {count}"

    def end() -> None:
        print(
            f"error: {who}: not all {count} processes have joined within {JOIN_SECONDS:g} s. See "
            "whether each was started, with a number of its own (JAX_PROCESS_ID, where no launcher "
            f"gives it) from 0 to {count - 1}, and what those that are missing say",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(2)  # the main thread waits in C++

    notice = f"{who}: waiting until all have joined, {JOIN_SECONDS:g} s at most"
    timers = [
        threading.Timer(_NOTICE_SECONDS, print, (notice,), {"flush": True}),
        threading.Timer(JOIN_SECONDS, end),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _parts(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)
