"""docs/launch/open_mpi.sh by a real Open MPI, on two hosts of this machine: `make open-mpi`.

COMMAND
    sudo apt-get install openmpi-bin openssh-server openssh-client iproute2
    sudo make open-mpi

Needs root, for the hosts have a network and processes of their own. Daemons, hosts and files are
gone when it ends. On CPUs.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.e2e.faults import saved_steps
from tests.real.hosts import Host, require, two_hosts, wait_until
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

PROGRAMS = {
    "mpirun": "openmpi-bin",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "ip": "iproute2",
}
SCRIPT = "docs/launch/open_mpi.sh"
_SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
SetEnv {variables}
"""


def start_ssh(hosts: tuple[Host, Host], folder: Path) -> None:
    """Let the hosts reach one another by ssh, with what a site would set for its users."""
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and makes it only as a service
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True
    )
    own = {k: v for k, v in environment().items() if os.environ.get(k) != v}
    variables = " ".join(f"{name}={value}" for name, value in own.items())
    (folder / "sshd.conf").write_text(_SSHD.format(folder=folder, variables=variables))
    for host in hosts:
        sshd = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd.conf")]
        host.start(sshd, folder / f"{host.name}.sshd")
        log = folder / f"{host.name}.sshd"
        wait_until(
            lambda log=log: "istening on" in log.read_text(), f"{host.name}: sshd does not start"
        )


class Run:
    """A run that mpirun has started from the first host: its processes, workdir and output."""

    def __init__(self, hosts: tuple[Host, Host], workdir: Path, steps: int, keys: Path):
        self._hosts, self.workdir = hosts, workdir
        self._log = workdir.with_suffix(f".{len(saved_steps(workdir))}.log")
        options = f"-i {keys} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        own = dict(CONFIG=CONFIG, WORKDIR=str(workdir))
        own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        own["OMPI_MCA_plm_rsh_args"] = f"{options} -q"
        command = ["bash", SCRIPT, ",".join(host.name for host in hosts), *arguments(steps)]
        self.started = hosts[0].start(command, self._log, env=environment(**own))

    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    def end(self) -> int:
        """Wait until nothing of it is left; returns its exit code."""
        wait_until(lambda: self.started.poll() is not None, f"mpirun does not end\n{self.log()}")
        wait_until(lambda: not any(map(self.processes, self._hosts)), "a process is left")
        return self.started.returncode

    def processes(self, host: Host) -> list[int]:
        """The processes of train.py on a host, but for mpirun and its script."""
        found = host.find("train.py", f"--workdir={self.workdir}")
        return [pid for pid in found if "python" in os.readlink(f"/proc/{pid}/exe")]


def main() -> None:
    require(PROGRAMS)
    with scratch() as folder, two_hosts("host1", "host2") as hosts:
        start_ssh(hosts, folder)
        version = hosts[0].run("mpirun", "--version").splitlines()[0]
        shown = Shown(f"{version}, two hosts, {SCRIPT}")
        alone = run_alone(folder / "alone")
        shown("one process, two devices", f"{len(alone)} losses to compare with")
        run = Run(hosts, folder / "two", len(alone), folder / "key")
        assert run.end() == 0, run.log()
        for i in range(2):
            place = f"process {i} of 2 (Open MPI), coordinator host1:12345"
            assert run.log().count(place) == 1, run.log()
        assert run.log().count("trainable") == 1, run.log()
        shown("two hosts", difference(run.workdir, alone))
        show_ends(hosts, folder, alone, shown)
        shown.end()


def show_ends(hosts: tuple[Host, Host], folder: Path, alone, shown: Shown) -> None:
    """SIGTERM to one process saves; a killed one ends the run; started again, it goes on."""
    workdir = folder / "stopped"
    run = Run(hosts, workdir, ENDLESS, folder / "key")
    wait_for_save(workdir, len(alone), [run.started])
    os.kill(run.processes(hosts[1])[0], signal.SIGTERM)
    code = run.end()
    assert code == 0, run.log()
    stood = stopped_at(workdir, run.log())
    shown("SIGTERM to one process", f"saved step {stood}, exit code {code}")
    run = Run(hosts, workdir, ENDLESS, folder / "key")
    wait_for_save(workdir, stood + EVERY, [run.started])
    assert f"continuing at step {stood}" in run.log(), run.log()
    os.kill(run.processes(hosts[1])[0], signal.SIGKILL)
    code = run.end()
    assert code not in (0, None) and "on signal 9" in run.log(), (code, run.log())
    shown("kill -9 of one process", f"went on at step {stood}; both ended, exit code {code}")
    difference(workdir, alone)


if __name__ == "__main__":
    main()
