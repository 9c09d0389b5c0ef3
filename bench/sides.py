"""The worker processes of a run: started on a device, asked with a deadline, started again."""

from __future__ import annotations

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


class BenchError(MMJaxError):
    """A side of a benchmark failed; the message holds its error."""


class DeadlineError(BenchError):
    """A side did not answer in the time its suite had left."""

    def __init__(self):
        super().__init__("deadline")


class Side:
    """A worker process; ``call`` sends one request and waits for the answer until ``until``."""

    def __init__(
        self, name: str, *, python: str = sys.executable, cores: int = 0, device: str = "cpu"
    ):
        self.name, self.until = name, math.inf
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
        """Return the answer to a request; past the deadline the process is ended."""
        left = self.until - time.monotonic()
        if left <= 0:
            self._end()
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self._answers.get(timeout=None if math.isinf(left) else left)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            self._end()
        if not line:
            code = self.process.wait(timeout=60)  # negative: the signal that ended it
            raise BenchError(
                f"the {self.name} side ended with code {code} before it answered {do!r}; its own "
                "message stands above"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name} side, {do}: {answer['error']}")
        return answer

    def _end(self) -> NoReturn:
        self.process.kill()
        self.process.wait(timeout=60)
        raise DeadlineError() from None

    def close(self) -> None:
        """End the process; one that does not end by itself is killed."""
        try:
            self.process.stdin.close()
            self.process.wait(timeout=60)
        except BrokenPipeError:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Sides:
    """The sides that a group of cases shares; one that has ended is started again when asked for.

    makers: the arguments of ``Side`` for each key; a case may use any of them.
    """

    def __init__(self, makers: Mapping[str, Mapping[str, Any]]):
        self.makers, self._running, self._versions = makers, {}, {}
        self._where: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.makers

    def get(self, key: str, until: float) -> Side:
        """Return a running side that has until ``until`` (of time.monotonic) to answer."""
        side = self._running.get(key)
        if side is None or side.process.poll() is not None:
            side = self._running[key] = Side(**self.makers[key])
        side.until = until
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
