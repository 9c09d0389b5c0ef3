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
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed() and stop.signal == number.name
    assert signal.getsignal(number) is before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_several_processes_stop_as_on_sigterm(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    asked = []

    def service(number):  # JAX's; it says yes where all have asked as often, once
        asked.append(number)
        return len(asked) == 3

    monkeypatch.setattr("mmjax.train.stop.multihost_utils.reached_preemption_sync_point", service)
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with StopFlag() as stop:
        assert not stop.agreed() and not stop.agreed()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert not stop  # the other processes may be a step behind
        assert stop.agreed() and stop.signal == "SIGHUP"
        assert stop.agreed()  # whoever asks again is told the same
    assert heard == [signal.SIGTERM] * 2  # by what the preemption service listens to
    assert asked == [1, 2, 3]


@pytest.mark.parametrize("several", [1, 2])
def test_the_first_sigint_saves_and_the_second_interrupts(monkeypatch, several):
    monkeypatch.setattr("jax.process_count", lambda: several)
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGTERM] * (several - 1) and bool(stop) == (several == 1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
