"""One side of a benchmark in its own process, told what to do line by line over a pipe.

Both sides of a case stay alive while it is measured and take turns: A, B, A, B, A. A line on stdin
is a request, a line on stdout its answer, both JSON; whatever else the libraries print goes to
stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback

import numpy as np

from bench import suites
from bench.cases import Case


def main() -> int:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side_name, cores = sys.argv[1], int(sys.argv[2])
    if cores and hasattr(os, "sched_setaffinity"):
        # Before any library counts the cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    worker = Worker(side_name)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = failure(error, worker.on_gpu)
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def failure(error: Exception, on_gpu: bool) -> dict:
    """Return the answer to a request that failed. broken: the process may be of no more use."""
    # What fails on a device is a RuntimeError to JAX and to torch; all that follows may fail too.
    return {
        "error": f"{type(error).__name__}: {error}",
        "broken": on_gpu and isinstance(error, RuntimeError),
    }


class Worker:
    """Holds one case at a time."""

    def __init__(self, side: str):
        if side == "ours":
            from bench import ours as module
        else:
            from bench import torch_peer as module

            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
            module.set_threads(cores or os.cpu_count() or 1)
        self.side, self.module, self.subject = side, module, None
        self.on_gpu = False

    def versions(self) -> dict:
        """Return library versions."""
        return self.module.versions()

    def write_model(self, case: dict, folder: str) -> dict:
        """Write a random model for both sides (the peer's request)."""
        found = Case.from_json(case)
        suites.module_of(found.suite, self.side).write_model(found.size, folder)
        return {}

    def prepare(
        self, case: dict, folder: str, impl: str, outputs: str, warmup: int, tune: bool
    ) -> dict:
        """Build the case, write its outputs as .npz, and warm up.

        tune: let the peer choose its fastest settings.
        """
        found = self._build(case, folder, impl)
        free = found.threads == 0 and found.device == "cpu"
        threads = self._tune_threads() if tune and free else ""
        if tune and hasattr(self.subject, "tune"):
            self.subject.tune()
        np.savez(outputs, **self.subject.outputs())
        for _ in range(warmup):
            self.subject.step()
        note = ", ".join(n for n in (threads, getattr(self.subject, "note", "")) if n)
        details = getattr(self.subject, "details", {})
        return {"compile_s": self.subject.compile_s, "note": note, "details": details}

    def survey(self, case: dict) -> dict:
        """Return what a suite without a peer finds."""
        self._build(case, "", "")
        return self.subject.survey()

    def _build(self, case: dict, folder: str, impl: str) -> Case:
        self.subject = None
        gc.collect()  # frees the previous one first, cycles and all
        found = Case.from_json(case)
        self.on_gpu = found.device.startswith("gpu")
        if self.on_gpu:
            self.module.check_gpu()
        self.subject = suites.side_of(found.suite, self.side)(found, folder, impl)
        return found

    def _tune_threads(self) -> str:
        """Let the peer choose its number of threads: small operators may be faster on one."""
        if not hasattr(self.module, "set_threads"):
            return ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        times = {}
        for count in sorted({1, cores or 1}):
            self.module.set_threads(count)
            first = self.measure(0, 1, 1)["seconds"][0]
            # Threads that wait for each other on a busy machine can take minutes for a step.
            if times and first > 4 * min(times.values()):
                continue
            times[count] = min(self.measure(0, 2, 2)["seconds"])
        best = min(times, key=times.get)
        self.module.set_threads(best)
        return f"{best} thread{'s' if best > 1 else ''}"

    def measure(self, seconds: float, least: int, most: int) -> dict:
        """Repeat for so many seconds, at least and at most so often.

        Returns each repetition's seconds by the clock, and the seconds of all cores per repetition,
        which other programs on the machine disturb less. A step may be several calls (``calls``),
        which count as so many repetitions.
        """
        calls = getattr(self.subject, "calls", 1)
        times: list[float] = []
        cpu = time.process_time()
        end = time.perf_counter() + seconds
        while len(times) < least or (time.perf_counter() < end and len(times) < most):
            begun = time.perf_counter()
            self.subject.step()
            times.append((time.perf_counter() - begun) / calls)
        return {"seconds": times, "cpu": (time.process_time() - cpu) / len(times) / calls}


if __name__ == "__main__":
    sys.exit(main())
