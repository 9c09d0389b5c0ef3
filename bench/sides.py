"""The worker processes of a run: started on a device, asked with a deadline, started again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from bench import environment
from mmjax import runtime
from mmjax.types import MMJaxError

DEVICES = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    # Nothing is timed there: LLVM's optimisation would only double the time to compile.
    "8 cpus": {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    },
    # No "cuda,cpu": without CUDA that would run on the CPU, and the rows would say GPU. Both sides
    # keep their memory while they take turns: JAX must not take three quarters of it.
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".45"},
    "gpu alone": {"JAX_PLATFORMS": "cuda"},  # without a peer; mmjax.runtime gives its share
}
"""Environment variables that put a side on a device."""
PATIENCE = 20
"""Seconds that a process has to end once it is told to."""


class BenchError(MMJaxError):
    """A side of a benchmark failed; the message holds its error."""


class DeadlineError(BenchError):
    """A side did not answer in the time that a request, or its suite, had left."""

    def __init__(self, what: str = "deadline"):
        super().__init__(what)


class Side:
    """A worker process; ``call`` sends one request and waits for the answer until ``until``."""

    def __init__(
        self, name: str, *, python: str = sys.executable, cores: int = 0, device: str = "cpu"
    ):
        self.name, self.until, self.seconds, self.ended = name, math.inf, math.inf, False
        self._held: tuple[str, dict[str, Any]] | None = None
        variables = dict(os.environ) | DEVICES[device]
        if "XLA_FLAGS" in DEVICES[device]:
            variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {variables['XLA_FLAGS']}"
        variables |= runtime.environment(variables)  # as the shells start, both sides
        self.variables = variables
        self.process = subprocess.Popen(
            [python, "-m", "bench.worker", name, str(cores)],
            cwd=environment.ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # A thread reads, so that waiting for an answer can end at a deadline.
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a request; past ``until`` or ``seconds`` the process is ended."""
        self._held = None if do == "survey" else self._held
        left = self.until - time.monotonic()
        if left <= 0:
            self._end("deadline")
        most = min(left, self.seconds)
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self._answers.get(timeout=None if math.isinf(most) else most)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            late = f"{self.name} side, {do}: not done within {self.seconds:g} s"
            self._end(late if self.seconds < left else "deadline")
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=PATIENCE)
            code = self.process.poll()  # negative: the signal that ended it
            self._kill()
            raise BenchError(
                f"the {self.name} side ended with code {code} before it answered {do!r}; its own "
                "message stands above"
            )
        answer = json.loads(line)
        if "error" in answer:
            if answer.get("broken"):  # a fault of a GPU's program fails all that follow it there
                self._kill()
            raise BenchError(f"{self.name} side, {do}: {answer['error']}")
        return answer

    def prepare(self, **arguments: Any) -> dict[str, Any]:
        """Return the answer to ``prepare``; what the side holds already is not built again."""
        asked = json.dumps(arguments, sort_keys=True)
        if self._held is None or self._held[0] != asked:
            self._held = None
            self._held = asked, self.call("prepare", **arguments)
        return self._held[1]

    def _end(self, what: str) -> NoReturn:
        self._kill()
        raise DeadlineError(what) from None

    def _kill(self) -> None:
        self.ended = True
        self.process.kill()
        # A program that never ends may hold it within the driver; the run goes on without it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=PATIENCE)

    def close(self) -> None:
        """End the process; one that does not end by itself is killed."""
        try:
            self.process.stdin.close()
            self.process.wait(timeout=PATIENCE)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._kill()


class Sides:
    """The sides that a group of cases shares; one that has ended is started again when asked for.

    makers: the arguments of ``Side`` for each key; a case may use any of them.
    """

    def __init__(self, makers: Mapping[str, Mapping[str, Any]]):
        self.makers, self._running, self._versions = makers, {}, {}
        self._where: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.makers

    def get(self, key: str, until: float, seconds: float | None = None) -> Side:
        """Return a running side that has until ``until`` (of time.monotonic) to answer.

        seconds: the most that it may take over one request; None for no such limit.
        """
        side = self._running.get(key)
        if side is None or side.ended or side.process.poll() is not None:
            if time.monotonic() >= until:  # nothing is started for an answer that nobody waits for
                raise DeadlineError()
            side = self._running[key] = Side(**self.makers[key])
        side.until, side.seconds = until, math.inf if seconds is None else seconds
        if key not in self._versions:
            self._versions[key] = side.call("versions")
            self._where = {}
        return side

    def where(self) -> dict[str, Any]:
        """Describe the environment: the machine, and the versions of the sides asked for so far."""
        if not self._where:
            where = environment.describe(dict(self._versions))
            tunables = {side.variables.get("GLIBC_TUNABLES", "") for side in self._running.values()}
            self._where = where | {"tunables": " or ".join(sorted(tunables))}
        return self._where

    def close(self) -> None:
        """End all of them."""
        for side in self._running.values():
            side.close()
