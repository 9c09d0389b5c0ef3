"""docs/launch/slurm.sbatch by a real SLURM of two nodes on this machine: `make slurm`.

COMMAND
    sudo apt-get install slurm-wlm munge iproute2
    sudo make slurm

Needs root, for the nodes have a network and processes of their own. Daemons, nodes and files are
gone when it ends. On CPUs; SLURM gives out GPUs that do not exist, to see whose they become.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from tests.e2e.faults import saved_steps
from tests.real.hosts import ROOT, wait_until
from tests.real.launched import (
    CONFIG,
    ENDLESS,
    EVERY,
    Shown,
    arguments,
    difference,
    environment,
    losses,
    run_alone,
    scratch,
    stopped_at,
    voices,
    wait_for_save,
)  # fmt: skip
from tests.real.slurm_cluster import Cluster, cluster

SCRIPT = "docs/launch/slurm.sbatch"
# What another cluster needs of the script: as many nodes and CPUs as it has.
ADAPTED = ("--nodes=2", "--cpus-per-task=1")
WHERE = """
import os
from mmjax.parallel.cluster import find_cluster
found = find_cluster({k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"})
own = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
print("GPU", *(own if found.devices is None else [own[i] for i in found.devices]))
"""


class Job:
    """A run in the queue: its number, workdir and output."""

    def __init__(self, slurm: Cluster, workdir: Path, steps: int, *options: str):
        self._slurm, self.workdir = slurm, workdir
        self._log = workdir.with_suffix(f".{len(saved_steps(workdir))}.log")
        env = environment(MMJAX_HOME=str(ROOT), CONFIG=CONFIG, WORKDIR=str(workdir))
        options = (*ADAPTED, *options, f"--output={self._log}", SCRIPT)
        self.number = slurm.submit(*options, *arguments(steps), env=env)

    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def end(self, state: str = "COMPLETED") -> str:
        """Wait for its end, which must be this; returns its exit code, ``code:signal``."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        facts = self._slurm.wait_for_state(self.number, *ends)
        assert facts["JobState"] == state, f"{facts}\n{self.log()}"
        return facts["ExitCode"]

    def goes_on(self, starts: int = 1) -> int:
        """Wait until it has gone on so many times and saved again; returns where it last began."""

        def begun() -> list[str]:
            return re.findall(r"continuing at step (\d+)", self.log())

        wait_until(lambda: len(begun()) >= starts, f"{self._log}: it does not go on")
        step = int(begun()[-1])
        wait_for_save(self.workdir, step + EVERY)
        return step


def show_training(slurm: Cluster, folder: Path, alone, shown: Shown) -> None:
    """Two nodes, and two tasks of one node, train like one process."""
    two = Job(slurm, folder / "two", 20)
    assert two.end() == "0:0", two.log()
    assert slurm.facts(two.number)["NodeList"] == "node[1-2]"
    for i in range(2):
        assert f"{i}: process {i} of 2 (SLURM), coordinator node1:" in two.log(), two.log()
    assert not voices(two.log(), "1: "), two.log()
    shown("two nodes", difference(two.workdir, alone))
    one = Job(slurm, folder / "one_node", 20, "--nodes=1", "--ntasks-per-node=2")
    assert one.end() == "0:0", one.log()
    shown("one node, two tasks", difference(one.workdir, alone))


def show_time(slurm: Cluster, folder: Path, shown: Shown) -> None:
    """The script's signal comes before its time is up."""
    job = Job(slurm, folder / "timed", ENDLESS, "--time=4")
    code = job.end()
    stood = stopped_at(job.workdir, job.log())
    shown("the time is nearly up", f"saved step {stood}, job COMPLETED, exit code {code}")


def show_stops(slurm: Cluster, folder: Path, alone, shown: Shown) -> None:
    """A signal, a requeue, a lost node and a killed task, one after the other."""
    workdir = folder / "stopped"
    job = Job(slurm, workdir, ENDLESS)
    wait_for_save(workdir, EVERY)
    slurm.run("scancel", "--signal=TERM", job.number)
    code = job.end()
    stood = stopped_at(workdir, job.log())
    shown("scancel --signal=TERM", f"saved step {stood}, job COMPLETED, exit code {code}")
    job = Job(slurm, workdir, ENDLESS)
    assert job.goes_on() == stood, job.log()
    slurm.run("scontrol", "requeue", job.number)
    step = job.goes_on(2)
    assert step >= stood + EVERY and slurm.facts(job.number)["Restarts"] == "1", job.log()
    shown("scontrol requeue", f"the same job went on at step {step}")
    show_lost_node(slurm, job, shown)
    kill_task(slurm, 1)
    code = job.end("FAILED")
    assert "task 1: Killed" in job.log(), job.log()
    wait_until(lambda: not any(tasks(slurm, i) for i in (0, 1)), "a task is left")
    shown("kill -9 of one task", f"the other ended too, job FAILED, exit code {code}")
    difference(workdir, alone)


def show_lost_node(slurm: Cluster, job: Job, shown: Shown) -> None:
    """The second node loses its power; SLURM starts the job again when it is back."""
    slurm.lose(slurm.hosts[1])
    wait_until(lambda: slurm.facts(job.number)["Restarts"] == "2", "the job is not requeued")
    slurm.wait_for_state(job.number, "PENDING")
    slurm.start_daemon(slurm.hosts[1])
    step = job.goes_on(3)
    assert step in saved_steps(job.workdir), job.log()
    shown("a node lost and back", f"SLURM started it again, it went on at step {step}")


def show_shells(slurm: Cluster, folder: Path, shown: Shown) -> None:
    """The shells that a person gets run one process; a batch script without srun is told."""
    for name, command in (("salloc's shell", ()), ("salloc's interactive step", INTERACTIVE)):
        workdir = folder / name.replace(" ", "_")
        train = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}"]
        env = environment(SLURM_CONF=slurm.env["SLURM_CONF"])
        allocated = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", *command)
        out = slurm.hosts[0].run(*allocated, *train, *arguments(2), env=env)
        assert len(losses(workdir)) == 2 and "process 0 of" not in out, out
        shown(name, "one process, 2 steps")
    script = folder / "without_srun.sh"
    script.write_text(f'#!/bin/bash\nexec {sys.executable} train.py "$@"\n')
    log = folder / "without_srun.log"
    env = environment()
    options = ("--wait", "--nodes=2", "--ntasks-per-node=1", f"--output={log}")
    arguments_ = (f"--config={CONFIG}", f"--workdir={folder / 'none'}")
    # sbatch --wait ends as the job does, with 2 for an error in the environment.
    failed = slurm.hosts[0].start(
        ["sbatch", "--quiet", *options, str(script), *arguments_], folder / "sbatch.log",
        env=env | {"SLURM_CONF": slurm.env["SLURM_CONF"]},
    )  # fmt: skip
    assert failed.wait() == 2 and "was not started by srun" in log.read_text(), log.read_text()
    shown("a batch script without srun", "refused and told, exit code 2")


# What salloc starts where LaunchParameters has use_interactive_step, without its terminal.
INTERACTIVE = ("srun", "--interactive", "--overlap", "--nodes=1", "--ntasks=1")


def show_gpus(slurm: Cluster, shown: Shown) -> None:
    """Each GPU that SLURM gives becomes that of one task."""
    for options, want in {
        "--gpus-per-node=8": ["GPU 0 1 2 3", "GPU 4 5 6 7"],
        "--gpus-per-task=2": ["GPU 0 1", "GPU 2 3"],
        "--gpus-per-task=1": ["GPU 0", "GPU 1"],
    }.items():
        step = ("srun", "--nodes=1", "--ntasks=2", options, sys.executable, "-c", WHERE)
        got = sorted(slurm.run(*step).splitlines())
        assert got == want, f"{options}: {got}"
        shown(f"two tasks, {options}", ", ".join(got))


def tasks(slurm: Cluster, index: int) -> list[int]:
    """The processes of train.py on a node."""
    return slurm.hosts[index].find("train.py", f"--config={CONFIG}")


def kill_task(slurm: Cluster, index: int) -> None:
    """Kill the run's process on a node."""
    python = [pid for pid in tasks(slurm, index) if "python" in os.readlink(f"/proc/{pid}/exe")]
    os.kill(python[0], signal.SIGKILL)


def main() -> None:
    with scratch() as folder, cluster(folder) as slurm:
        shown = Shown(f"{slurm.run('sinfo', '--version').strip()}, two nodes, {SCRIPT}")
        show_gpus(slurm, shown)
        alone = run_alone(folder / "alone")
        shown("one process, two devices", f"{len(alone)} losses to compare with")
        show_training(slurm, folder, alone, shown)
        show_shells(slurm, folder, shown)
        show_stops(slurm, folder, alone, shown)
        show_time(slurm, folder, shown)
        shown.end()


if __name__ == "__main__":
    main()
