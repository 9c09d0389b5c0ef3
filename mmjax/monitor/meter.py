"""The clock of a run: throughput, waiting, utilisation and time left."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

from mmjax.monitor.flops import MEASURED, Peak


@dataclasses.dataclass
class _Interval:
    """What was counted since the last report."""

    start: float
    steps: int = 0
    tokens: float = 0.0
    images: float = 0.0
    samples: float = 0.0
    flops: float = 0.0
    waited: float = 0.0
    paused: float = 0.0


class Meter:
    """Measure training speed between reports.

    The first step, which compiles, is left out, and so is whatever happens inside ``pause()``.
    Steps are dispatched ahead of the device: call ``report`` after something was fetched from it,
    and the first ``step`` when the device is done with that step.

    total_steps: of the whole run. start_step: steps done before, by the run that is continued.
    peak: FLOP/s of all devices together, None where it is not known: no ``perf/mfu`` then. One that
    was measured while something else ran is too low: what steps reach above it takes its place.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        peak: Peak | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.total_steps, self.peak = total_steps, peak
        self._clock = clock
        self._step = start_step
        self._measured_from: tuple[float, int] | None = None  # (time, step) after the first step
        self._interval = _Interval(clock())

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Measure the wait for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._interval.waited += self._clock() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock, for evaluation and checkpoints."""
        start = self._clock()
        try:
            yield
        finally:
            self._interval.paused += self._clock() - start

    def step(
        self, *, tokens: float = 0, images: float = 0, samples: float = 0, flops: float = 0
    ) -> None:
        """Count one step: totals over all devices; flops of forward and backward together."""
        self._step += 1
        if self._measured_from is None:
            now = self._clock()
            self._measured_from, self._interval = (now, self._step), _Interval(now)
            return
        i = self._interval
        i.steps += 1
        i.tokens += tokens
        i.images += images
        i.samples += samples
        i.flops += flops

    def report(self) -> dict[str, float]:
        """Return ``perf/*`` since the last report and start the next interval.

        Empty while only the first step was made. perf/step_s, perf/data_wait_s: seconds a step;
        perf/tok_s, perf/img_s, perf/sample_s: a second; perf/mfu: 0 to 1.
        """
        i, now = self._interval, self._clock()
        if not i.steps:
            return {}
        seconds = max(now - i.start - i.paused, 1e-9)
        self._interval = _Interval(now)
        rates = {"perf/tok_s": i.tokens, "perf/img_s": i.images, "perf/sample_s": i.samples}
        out = {"perf/step_s": seconds / i.steps, "perf/data_wait_s": i.waited / i.steps}
        out |= {name: count / seconds for name, count in rates.items() if count}
        if self.peak and i.flops:
            reached = i.flops / seconds
            if self.peak.source == MEASURED and reached > self.peak.flops:
                self.peak = Peak(reached, MEASURED)
            out["perf/mfu"] = reached / self.peak.flops
        return out

    def eta(self) -> float | None:
        """Return the seconds left, pauses at the rate they came so far; None until known."""
        if self._measured_from is None or self._step == self._measured_from[1]:
            return None
        since, first = self._measured_from
        each = (self._clock() - since) / (self._step - first)
        return max(self.total_steps - self._step, 0) * each
