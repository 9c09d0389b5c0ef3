"""Whether the processes of a run can meet: the first one's port is free, the others reach it.

JAX lets the coordinators of two runs share a port, which ends both; and a process that reaches none
is ended in C++ without the reason.
"""

from __future__ import annotations

import errno
import socket
import time

from mmjax.types import MMJaxError

REACH_SECONDS = 300  # in which the first process has to answer; a pod's name may come late
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


def _parts(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)
