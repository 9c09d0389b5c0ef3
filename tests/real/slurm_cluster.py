"""A SLURM cluster of two nodes on this machine: its daemons, its jobs, and what became of them."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.real.hosts import Host, require, two_hosts, wait_until

PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "nsenter": "util-linux",
    "ip": "iproute2",
}
GPUS = 8  # of a node; devices like /dev/null stand for them, for SLURM only gives out their numbers

_CONFIG = """
ClusterName=mmjax
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
JobCompType=jobcomp/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
MinJobAge=86400
GresTypes=gpu
LaunchParameters=use_interactive_step
SlurmdParameters=config_overrides
NodeName={nodes} CPUs=8 Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=YES
"""


class Cluster:
    """A cluster that runs: its two hosts, and the folder of its files."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path):
        self.hosts, self.folder = hosts, folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run a command of SLURM's on the first node."""
        return self.hosts[0].run(*command, env=self.env)

    def submit(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        """Submit a batch script; returns the number of its job."""
        told = self.hosts[0].run("sbatch", "--parsable", *arguments, env=self.env | (env or {}))
        return told.split()[-1].split(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol tells of a job: JobState, ExitCode, Restarts, ..."""
        told = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", told))

    def wait_for_state(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of the states; returns its facts."""
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.facts(job))
            return found["JobState"] in states

        wait_until(there, f"job {job} is not {' or '.join(states)}")
        return found

    def start_daemon(self, host: Host) -> subprocess.Popen:
        """Start a node's daemon."""
        command = ["slurmd", "-D", "-N", host.name]
        return host.start(command, self.folder / f"{host.name}.out", env=self.env)

    def lose(self, host: Host) -> None:
        """End everything of SLURM's on a node at once, the tasks too; SLURM finds out by itself."""
        host.kill_all()
        wait_until(lambda: "down" in self.run("sinfo", "--noheader", "--format=%T"), "no node down")

    def wait_for_nodes(self) -> None:
        """Wait until both nodes take jobs."""

        def idle() -> bool:
            told = self.run("sinfo", "--noheader", "--format=%D %T")
            return told.split() == ["2", "idle"]

        wait_until(idle, "the nodes are not idle")


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Run a cluster of node1 and node2 for the time of a block. folder: for its files."""
    require(PROGRAMS)
    folder.chmod(0o755)
    with two_hosts("node1", "node2") as hosts:
        for name in ("state", "spool-node1", "spool-node2"):
            (folder / name).mkdir()
        gpus = [folder / f"gpu{i}" for i in range(GPUS)]
        for gpu in gpus:
            os.mknod(gpu, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        # The nodes see no cgroups; named, a kind of them is not looked for.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        values = dict(folder=folder, first="node1", nodes="node[1-2]", gpus=GPUS)
        (folder / "slurm.conf").write_text(_CONFIG.format(**values))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        files = {
            "socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid",
            "log-file": "munge.log", "seed-file": "munge.seed",
        }  # fmt: skip
        own = [f"--{flag}={folder / name}" for flag, name in files.items()]
        # One munged serves both nodes: they share the files, and so its socket.
        munged = ["munged", "--foreground", "--force", *own]
        hosts[0].start(munged, folder / "munged.out")
        wait_until((folder / "munge.socket").exists, "munged does not start")
        made = Cluster(hosts, folder)
        hosts[0].start(["slurmctld", "-D"], folder / "slurmctld.out", env=made.env)
        for host in hosts:
            made.start_daemon(host)
        wait_until((folder / "slurmctld.pid").exists, "slurmctld does not start")
        made.wait_for_nodes()
        yield made
