"""Where processes are to meet: a port that is taken, a first process that is not there."""

import errno
import os
import socket
import threading
from contextlib import nullcontext

import pytest

from mmjax.parallel import coordinator
from mmjax.types import MMJaxError


def test_a_port_that_another_run_shares_is_taken():
    with socket.socket(socket.AF_INET6) as other:
        # As JAX's coordinator listens: a second one could share the port, and both runs would end.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("::", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(MMJaxError, match=f"port {port}, .* in use.*JAX_COORDINATOR_ADDRESS"):
            coordinator.check_free(f"node1:{port}")
    coordinator.check_free(f"node1:{port}")


@pytest.mark.parametrize("code, told", [(errno.EACCES, True), (errno.EAFNOSUPPORT, False)])
def test_a_port_that_is_not_allowed_is_told_and_other_faults_are_left_to_jax(
    monkeypatch, code, told
):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(socket, "create_server", refuse)
    expected = pytest.raises(MMJaxError, match="port 80, .*denied") if told else nullcontext()
    with expected:
        coordinator.check_free("node1:80")


@pytest.mark.parametrize("host", ["[127.0.0.1]", "localhost"])
def test_the_first_process_is_reached_or_the_reason_told(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{host}:{server.getsockname()[1]}"
        coordinator.wait_for(address, 30)
    with pytest.raises(MMJaxError, match=r"process 0 was not reached") as error:
        coordinator.wait_for(address, 0)
    assert f"not reached at {address} within 0 s: Connection refused" in str(error.value)


def test_a_host_without_a_name_is_told():
    with pytest.raises(MMJaxError, match="not reached at no-such-host.invalid:1 within 0 s: "):
        coordinator.wait_for("no-such-host.invalid:1", 0)


def test_processes_that_do_not_come_are_told(monkeypatch, capsys):
    codes, ended = [], threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    with coordinator.all_expected(1, 3):  # they came
        timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert len(timers) >= 2 and all(t.finished.is_set() for t in timers)
    monkeypatch.setattr(coordinator, "JOIN_SECONDS", 0)
    monkeypatch.setattr(coordinator, "_NOTICE_SECONDS", 0)
    with coordinator.all_expected(1, 3):
        assert ended.wait(60)
    assert codes == [2]
    out, error = capsys.readouterr()
    assert "error: process 1 of 3: not all 3 processes have joined within 0 s. See" in error
    assert "with a number of its own" in error and "from 0 to 2" in error
    assert out in ("", "process 1 of 3: waiting until all have joined, 0 s at most\n")
