"""Stopping on a signal: finish the step, save, and leave with exit code 0."""

import signal
from types import FrameType


class StopFlag:
    """True once SIGTERM or SIGINT has arrived; a second SIGINT interrupts at once."""

    def __init__(self):
        self.signal: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
