"""Stopping on a signal: finish the step, save, and leave with exit code 0."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopFlag:
    """True once SIGTERM, SIGINT or SIGHUP has arrived; a second SIGINT interrupts at once.

    Several processes have to stop at the same place: there JAX's preemption service hears a SIGTERM
    in any of them, and ``agreed`` tells all of them when. SIGINT and SIGHUP, which a terminal sends
    that is closed, count as SIGTERM there; a SIGHUP that ``nohup`` ignores stays ignored.
    """

    def __init__(self):
        self.signal: str | None = None
        self._heard: str | None = None  # in this process, whether all have agreed yet or not
        self._asked = 0
        self._previous: dict[int, object] = {}
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopFlag":
        # A handler of ours would take SIGTERM away from the preemption service.
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers += (signal.SIGHUP,)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    def agreed(self) -> bool:
        """Tell whether to stop here, the same in every process; each asks as often as the others.

        Between steps and between the batches of an evaluation: the service counts the questions.
        """
        if self._several and self.signal is None:
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.signal = self._heard or signal.SIGTERM.name
        return bool(self)

    def ask(self) -> None:
        """Stop as on a SIGTERM."""
        signal.raise_signal(signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._heard and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._heard = signal.Signals(number).name
        if self._several:
            self.ask()
        else:
            self.signal = self._heard
