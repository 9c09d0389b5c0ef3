"""The fault script: kill a real training run again and again, and lose nothing.

COMMAND
    make faults
    python -m tests.e2e.faults --kills=50 --seed=0

An undisturbed run comes first. Then runs of the same recipe are killed by SIGKILL and SIGTERM at
moments drawn from the seed: while the process starts, between two steps, in the middle of a save,
right behind one, or while the end is saved and exported. Each killed run is started again until it
is done, and must equal the undisturbed one bit for bit: the metrics of every step, however often
it ran, and the parameters.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
MOMENTS = ("start", "step", "save", "saved", "end")
TIMEOUT = 240  # seconds without an end after which a process counts as hanging


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is run: a quick recipe, its length, and how often it saves."""

    steps: int = 60
    every: int = 5
    config: str = "configs/quickstart.py:quick"
    overrides: tuple[str, ...] = (
        "model.config.hidden_size=32",
        "model.config.intermediate_size=32",
        "data.batch_size=2",
        "log.tensorboard=False",
    )

    def start(self, workdir: Path, *more: str, prefix: Sequence[str] = ()) -> subprocess.Popen:
        """Start (or continue) a run in a process of its own; its output goes to a file.

        prefix: words in front of the command, such as those of another program that runs it.
        """
        overrides = (
            f"steps={self.steps}", f"checkpoint.every={self.every}", "eval.final=False",
            "log.every=1", *self.overrides, *more,
        )  # fmt: skip
        command = [
            *prefix,
            sys.executable,
            "train.py",
            f"--config={self.config}",
            f"--workdir={workdir}",
        ]
        command += [f"--config.{o}" for o in overrides]
        environment = os.environ | {
            "XDG_CACHE_HOME": str(ROOT / ".cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        with open(log_of(workdir), "a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )


def log_of(workdir: Path) -> Path:
    """The file a run's output goes to, beside its workdir."""
    return workdir.with_suffix(".log")


def finish(process: subprocess.Popen, workdir: Path) -> tuple[int, str]:
    """Wait for the end; return the exit code and everything that was printed so far."""
    try:
        process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"{workdir} hangs:\n{log_of(workdir).read_text()}") from None
    return process.returncode, log_of(workdir).read_text()


def saved_steps(workdir: Path) -> list[int]:
    """The finished checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def logged(workdir: Path) -> list[tuple[int, dict[str, float]]]:
    """Every row of metrics that was written: (step, its ``train/*`` values), in order."""
    file = workdir / "metrics.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill
        values = {k: v for k, v in row.items() if k.startswith("train/")}
        if values:
            rows.append((row["step"], values))
    return rows


def last_step(workdir: Path) -> int:
    """The last step this workdir tells of, 0 before the first."""
    rows = logged(workdir)
    return rows[-1][0] if rows else 0


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """The parameters a finished run has exported."""
    from mmjax.weights.store import StoreReader

    reader = StoreReader(workdir / "model" / "params")
    return {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118


def assert_equal_runs(workdir: Path, undisturbed: Path) -> None:
    """Raise AssertionError unless two finished runs are equal bit for bit."""
    want = dict(logged(undisturbed))
    rows = logged(workdir)
    for step, values in rows:
        assert values == want[step], f"{workdir}: step {step} is {values}, not {want[step]}"
    assert {step for step, _ in rows} == set(want), f"{workdir}: not every step was logged"
    ours, theirs = parameters(workdir), parameters(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=f"{workdir}: {name}")


def wait_for(happened, process: subprocess.Popen, every: float = 0.01) -> bool:
    """Poll every so many seconds until something happened; False if the process ended before."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None:
        if happened():
            return True
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(every)
    return False


def wait_for_moment(moment: str, recipe: Recipe, workdir: Path, process, rng, startup: float):
    """Wait for a moment worth killing at; False if the run was done before."""
    stood = saved_steps(workdir)
    if moment == "start":
        until = time.monotonic() + rng.uniform(0, startup)
        return wait_for(lambda: time.monotonic() >= until, process)
    first = stood[-1] if stood else 0
    if moment == "end":  # the last save, or the export of the model
        found = wait_for(lambda: last_step(workdir) >= recipe.steps, process)
        time.sleep(rng.uniform(0, 0.5))
        return found and process.poll() is None
    if moment == "step":
        aim = first + rng.randint(1, 2 * recipe.every)
        before = len(logged(workdir))
        return wait_for(lambda: any(step >= aim for step, _ in logged(workdir)[before:]), process)
    aim = first + recipe.every * rng.randint(1, 2)
    folder = workdir / "checkpoints"
    if moment == "save":
        begun = time.time_ns()  # what an earlier kill has left behind is no save of this process
        found = wait_for(
            lambda: any(_made(p) > begun for p in folder.glob(f"{aim}.*tmp*")), process, 0.001
        )
    else:
        found = wait_for(lambda: any(step >= aim for step in saved_steps(workdir)), process)
    if found:
        time.sleep(rng.choice((0.0, rng.uniform(0, 0.05))))  # anywhere within the save
    return found


def _made(path: Path) -> int:
    """When a folder was last changed, in nanoseconds; 0 if it is gone by now."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def check_loss(recipe: Recipe, workdir: Path, stopped_cleanly: bool) -> int:
    """Check what a kill has cost; returns the steps that have to be run again."""
    stands = max(saved_steps(workdir), default=0)
    reached = last_step(workdir)
    # A save goes on in the background; the next one, which starts when the metrics of its step are
    # written, waits for it. So behind step 10, saved every 5, at least step 5 is on disk.
    due = ((reached - 1) // recipe.every - 1) * recipe.every
    assert stands >= due, f"{workdir}: step {reached} was reached and only {stands} is saved"
    if stopped_cleanly:
        assert stands >= reached, f"{workdir}: stopped at step {reached}, saved only {stands}"
    return max(0, reached - stands)


def run_with_kills(recipe: Recipe, workdir: Path, kills: int, rng, startup: float, report) -> int:
    """Run to the end under at most so many kills; returns how many there were."""
    done = 0
    while True:
        stood, before = max(saved_steps(workdir), default=0), len(log_text(workdir))
        process = recipe.start(workdir)
        moment = rng.choice(MOMENTS) if done < kills else None
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        if moment is None or not wait_for_moment(moment, recipe, workdir, process, rng, startup):
            code, out = finish(process, workdir)
            assert code == 0, f"{workdir}: restarted at step {stood}, exit code {code}\n{out}"
            return done
        process.send_signal(number)
        twice = number == signal.SIGTERM and rng.random() < 0.3
        if twice:  # a cluster that loses patience while the run saves
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        code, out = finish(process, workdir)
        allowed = {-signal.SIGKILL} if number == signal.SIGKILL else {0, -signal.SIGTERM}
        allowed |= {-signal.SIGKILL} if twice else set()
        allowed |= {0}  # it was done already when the signal arrived
        assert code in allowed, f"{workdir}: {moment}, {number.name}, exit code {code}\n{out}"
        clean = re.search(r"SIGTERM: saved step", out[before:]) is not None
        lost = check_loss(recipe, workdir, clean)
        done += 1
        report(moment, number, workdir, lost)


def log_text(workdir: Path) -> str:
    """What the runs in a workdir have printed."""
    return log_of(workdir).read_text() if log_of(workdir).exists() else ""


def run_undisturbed(recipe: Recipe, workdir: Path) -> float:
    """Make the run to compare with; returns the seconds it took to its first step."""
    begin = time.monotonic()
    process = recipe.start(workdir)
    wait_for(lambda: last_step(workdir) > 0, process)
    startup = time.monotonic() - begin
    code, out = finish(process, workdir)
    assert code == 0, out
    return startup


def run_faults(kills: int, seed: int, folder: Path, *, recipe: Recipe | None = None) -> str:
    """Kill runs until there were ``kills`` of them; returns a line that sums up.

    Raises AssertionError when a restart fails, steps are lost, or a run differs.
    """
    recipe, rng, begin = recipe or Recipe(), random.Random(seed), time.monotonic()
    counts: collections.Counter = collections.Counter()
    undisturbed = folder / "undisturbed"
    if not (undisturbed / "model").exists():
        run_undisturbed(recipe, undisturbed)
        print(f"undisturbed: {recipe.steps} steps in {time.monotonic() - begin:.1f} s", flush=True)
    # A second start finds its programs in the compilation cache.
    startup = run_undisturbed(recipe, folder / "again")
    assert_equal_runs(folder / "again", undisturbed)
    lost: list[int] = []

    def report(moment: str, number: signal.Signals, workdir: Path, steps: int) -> None:
        counts.update((moment, number.name))
        lost.append(steps)
        print(
            f"kill {len(lost)}/{kills}: {number.name} at {moment!r}, {workdir.name} at step "
            f"{last_step(workdir)}, saved {max(saved_steps(workdir), default=0)}, "
            f"{time.monotonic() - begin:.0f} s",
            flush=True,
        )

    runs = 0
    while len(lost) < kills:
        workdir = folder / f"run{runs}"
        run_with_kills(recipe, workdir, kills - len(lost), rng, startup, report)
        assert_equal_runs(workdir, undisturbed)
        runs += 1
    kinds = ", ".join(f"{counts[k]} {k}" for k in ("SIGKILL", "SIGTERM", *MOMENTS))
    return (
        f"{kills} kills ({kinds}) in {runs} runs of {recipe.steps} steps, seed {seed}: every "
        f"restart went on, at most {max(lost)} steps ran twice (saved every {recipe.every}), "
        f"all runs equal the undisturbed one bit for bit; {time.monotonic() - begin:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary one)")
    args = parser.parse_args()
    if args.folder:
        args.folder.mkdir(parents=True)
        print(run_faults(args.kills, args.seed, args.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(run_faults(args.kills, args.seed, Path(folder)))


if __name__ == "__main__":
    main()
