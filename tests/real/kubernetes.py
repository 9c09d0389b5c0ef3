"""docs/launch/kubernetes.yaml without a cluster: its schema, and its pods' command on two hosts.

COMMAND
    sudo apt-get install iproute2
    sudo make kubernetes

kubernetes-validate (PyPI) checks the file against the API's schema. Then the container's command
runs as it does in a pod: the first process of a process namespace, with the variables of an indexed
job, on hosts that know one another by the names that the headless service gives. Image, volumes and
GPUs are not tried. Needs root; hosts and files are gone when it ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from tests.real.hosts import ROOT, Host, require, two_hosts, wait_until
from tests.real.launched import (
    CONFIG,
    ENDLESS,
    EVERY,
    Shown,
    arguments,
    difference,
    environment,
    run_alone,
    scratch,
    stopped_at,
    wait_for_save,
)  # fmt: skip

FILE = "docs/launch/kubernetes.yaml"
PODS = 2  # of the four that the file asks for
PROGRAMS = {"nsenter": "util-linux", "ip": "iproute2"}


class Pods:
    """What the file says of a pod, and how the two are started."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path):
        service, job = yaml.safe_load_all((ROOT / FILE).read_text())
        self.hosts, self._folder = hosts, folder
        pod = job["spec"]["template"]["spec"]
        (self._container,) = pod["containers"]
        self._env = {one["name"]: one["value"] for one in self._container["env"]}
        # What ties the parts of the file together; the schema knows nothing of it.
        name, first = job["metadata"]["name"], self._env["JAX_COORDINATOR_ADDRESS"]
        assert service["spec"]["selector"] == {"job-name": name}
        assert pod["subdomain"] == service["metadata"]["name"]
        assert (
            first == f"{name}-0.{pod['subdomain']}:{self._container['ports'][0]['containerPort']}"
        )
        spec = job["spec"]
        assert spec["completions"] == spec["parallelism"] == int(self._env["JAX_NUM_PROCESSES"])

    def start(self, index: int, workdir: Path, steps: int) -> subprocess.Popen:
        """Start the container of a pod; its output goes to ``log``."""
        own = {"--config": CONFIG, "--workdir": str(workdir)}
        command = [f"{w.split('=')[0]}={own[w.split('=')[0]]}" if "=" in w else w
                   for w in self._container["command"]]  # fmt: skip
        assert command[0] == "python"
        command[0] = sys.executable
        given = self._env | {"JAX_NUM_PROCESSES": str(PODS), "JOB_COMPLETION_INDEX": str(index)}
        alone = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
        return self.hosts[index].start(
            [*alone, *command, *arguments(steps)],
            self.log(index, workdir),
            env=environment(**given),
        )

    def log(self, index: int, workdir: Path) -> Path:
        """The file of a pod's output."""
        return workdir.with_suffix(f".{index}.log")

    def read(self, workdir: Path) -> list[str]:
        """What the pods have printed so far."""
        return [self.log(i, workdir).read_text(errors="replace") for i in range(PODS)]


def process_of(pod: subprocess.Popen) -> int:
    """The number of a pod's first process, train.py, as this program sees it."""
    found = pod.pid
    for _ in range(2):  # nsenter, unshare, train.py
        (child,) = Path(f"/proc/{found}/task/{found}/children").read_text().split()
        found = int(child)
    return found


def codes(pods: list[subprocess.Popen]) -> list[int]:
    """Wait for the end of the pods; returns their exit codes."""
    for pod in pods:
        wait_until(lambda pod=pod: pod.poll() is not None, f"{pod.args} does not end")
    return [pod.returncode for pod in pods]


def show_training(pods: Pods, folder: Path, alone, shown: Shown) -> None:
    """The second pod comes first, before the first one has a name; they train like one process."""
    workdir = folder / "two"
    first, second = pods.hosts
    known = second.names.read_text()
    second.names.write_text("".join(x for x in known.splitlines(True) if first.name not in x))
    late = pods.start(1, workdir, len(alone))
    says = "process 1 of 2 (Kubernetes indexed job), coordinator mmjax-0.mmjax:12345"
    wait_until(
        lambda: says in pods.log(1, workdir).read_text(), "the second pod does not start", [late]
    )
    second.names.write_text(known)
    started = [pods.start(0, workdir, len(alone)), late]
    assert codes(started) == [0, 0], pods.read(workdir)
    shown("two pods, the second one first", difference(workdir, alone))


def show_ends(pods: Pods, folder: Path, alone, shown: Shown) -> None:
    """A pod that is told to stop, and one that dies."""
    workdir = folder / "stopped"
    started = [pods.start(i, workdir, ENDLESS) for i in range(PODS)]
    wait_for_save(workdir, len(alone), started)
    os.kill(process_of(started[1]), signal.SIGTERM)
    assert codes(started) == [0, 0], pods.read(workdir)
    stood = stopped_at(workdir, pods.read(workdir)[0])
    shown("SIGTERM to one pod", f"saved step {stood}, exit codes 0 and 0")
    started = [pods.start(i, workdir, ENDLESS) for i in range(PODS)]
    wait_for_save(workdir, stood + EVERY, started)
    assert f"continuing at step {stood}" in pods.read(workdir)[0]
    os.kill(process_of(started[0]), signal.SIGKILL)
    ended = codes(started)
    assert all(ended), (ended, pods.read(workdir))
    shown("kill -9 of the first pod", f"the other ended too, exit code {ended[1]}")
    difference(workdir, alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", required=True, help="the command kubernetes-validate")
    validate = parser.parse_args().validate
    require(PROGRAMS)
    checked = subprocess.run([validate, "--strict", FILE], cwd=ROOT, text=True, capture_output=True)
    told = checked.stdout + checked.stderr
    assert checked.returncode == 0 and told.count("passed") == 2, told
    version = told.split("version ")[-1].split()[0]
    names = tuple(f"mmjax-{i}" for i in range(PODS))
    aliases = tuple(f"{name}.mmjax" for name in names)
    with scratch() as folder, two_hosts(*names, aliases=aliases) as hosts:
        shown = Shown(f"Kubernetes without a cluster, two pods, {FILE}")
        shown("schema", f"service and job valid in Kubernetes {version}")
        pods = Pods(hosts, folder)
        alone = run_alone(folder / "alone")
        shown("one process, two devices", f"{len(alone)} losses to compare with")
        show_training(pods, folder, alone, shown)
        show_ends(pods, folder, alone, shown)
        shown.end()


if __name__ == "__main__":
    main()
