"""Signals that stop a run, and those that are not meant for it."""

import signal

import pytest

from mmjax.train.stop import StopFlag


@pytest.fixture(autouse=True)
def as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_and_the_handler_before_comes_back(number):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.agreed(1)
        signal.raise_signal(number)
        assert stop.agreed(2) and stop.signal == number.name
    assert signal.getsignal(number) is before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_several_processes_stop_as_on_sigterm(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with StopFlag():
        signal.raise_signal(signal.SIGHUP)
    assert heard == [signal.SIGTERM]  # by what the preemption service listens to
