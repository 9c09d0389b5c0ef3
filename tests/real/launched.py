"""What a launcher's proof runs: a small recipe for two processes, and what it must come to."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.faults import last_step, logged, saved_steps
from tests.real.hosts import ROOT, TIMEOUT, wait_until

CONFIG = "configs/quickstart.py:quick"
STEPS, EVERY = 20, 5
ENDLESS = 10**6
# The rate is the same at every step, so that losses do not depend on how many there are to be.
SETTINGS = {
    "checkpoint.every": EVERY,
    "checkpoint.keep": 100,
    "data.streams": 2,
    "eval.final": False,
    "log.every": 1,
    "log.tensorboard": False,
    "model.config.hidden_size": 32,
    "model.config.intermediate_size": 32,
    "optim.schedule": "constant",
    "optim.warmup": 0,
}


def arguments(steps: int = STEPS) -> list[str]:
    """Return the overrides of a run of so many steps."""
    return [f"--config.{key}={value}" for key, value in {**SETTINGS, "steps": steps}.items()]


def environment(**more: str) -> dict[str, str]:
    """Return this program's variables with those of a run on CPUs, one a process, and more."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(ROOT / ".cache"),
        **more,
    }


def losses(workdir: Path) -> dict[int, float]:
    """The loss of every step; of steps that ran twice, the last."""
    return {step: values["train/loss"] for step, values in logged(workdir)}


def run_alone(workdir: Path) -> dict[int, float]:
    """Run the recipe as one process with two devices; returns the losses of its steps."""
    command = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}"]
    done = subprocess.run(
        command + arguments(), cwd=ROOT, env=environment(JAX_NUM_CPU_DEVICES="2"), text=True,
        timeout=TIMEOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert len(losses(workdir)) == STEPS
    return losses(workdir)


def difference(workdir: Path, alone: dict[int, float]) -> str:
    """Return, in words, how far the losses lie from those of one process; AssertionError if far."""
    mine = losses(workdir)
    assert alone.keys() <= mine.keys(), f"{workdir}: steps {sorted(mine)}"
    most = max(abs(mine[step] / loss - 1) for step, loss in alone.items())
    assert most < 1e-5, f"{workdir}: {mine}, alone {alone}"
    apart = f"at most {most:.0e} of a loss apart from" if most else "equal to"
    return f"{len(alone)} losses, {apart} those of one process"


def wait_for_save(workdir: Path, step: int, alive=()) -> None:
    """Wait until a checkpoint at or behind a step is on disk. alive: what must not end before."""
    wait_until(
        lambda: any(saved >= step for saved in saved_steps(workdir)),
        f"{workdir} has no checkpoint at step {step}",
        alive,
    )


def stopped_at(workdir: Path, log: str) -> int:
    """Return the step that a run has saved when it was stopped; AssertionError if it has not."""
    step = saved_steps(workdir)[-1]
    assert f"SIGTERM: saved step {step}" in log and last_step(workdir) == step, log
    return step


def voices(log: str, mark: str) -> list[str]:
    """Return the lines of the second process but for its place; mark: what they begin with."""
    lines = [line.removeprefix(mark).strip() for line in log.splitlines() if line.startswith(mark)]
    return [line for line in lines if "process 1 of 2" not in line and "[Gloo]" not in line]


class Shown:
    """The table of what was shown: a line each, printed as it is found."""

    def __init__(self, title: str):
        self._begin = self._last = time.monotonic()
        print(title, flush=True)

    def __call__(self, what: str, found: str) -> None:
        now = time.monotonic()
        print(f"  {what:34} {found}  ({now - self._last:.0f} s)", flush=True)
        self._last = now

    def end(self) -> None:
        """Say that all of it was shown."""
        print(f"all shown in {time.monotonic() - self._begin:.0f} s", flush=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder for a proof's files; if the proof fails it stays, and is told."""
    folder = Path(tempfile.mkdtemp(prefix="mmjax-launch-"))
    try:
        yield folder
    except BaseException:
        print(f"what was written stays in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
