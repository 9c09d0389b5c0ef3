"""Several hosts on one machine: a network, process and name space each; needs root and iproute2.

A host has its own address, hostname, /etc/hosts and process table, and shares the files. They see
one another and nothing else. All that runs on one ends with it, however the block of it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds without an end after which something counts as hanging
_SPACE = "mmjax-{}"  # the name of a host's network namespace
_NETWORK = "192.0.2.{}"  # set aside for documentation: no such address exists elsewhere
# The first process of a host: it waits for those whose parents have ended, and for its own end.
_FIRST = 'hostname "$0"; trap : TERM; while :; do sleep 3600 & wait; done'


class Host:
    """One host: its name, its address, and how commands are run on it."""

    def __init__(self, name: str, number: int):
        self.name, self.address, self.space = name, _NETWORK.format(number), _SPACE.format(name)
        self.names = Path("/etc/netns", self.space, "hosts")  # what /etc/hosts is here
        self._first: subprocess.Popen | None = None
        self._prefix: list[str] = []

    def start(self, command: Sequence[str], log: Path | None = None, **more) -> subprocess.Popen:
        """Start a command here; its output goes behind what is in a file."""
        if log is None:
            return subprocess.Popen([*self._prefix, *command], **more)
        with open(log, "ab") as file:
            out = {"stdout": file, "stderr": subprocess.STDOUT}
            return subprocess.Popen([*self._prefix, *command], **out, **more)

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """Run a command here to its end and return what it prints; raises AssertionError."""
        done = subprocess.run(
            [*self._prefix, *command], env=env, text=True, timeout=TIMEOUT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}\n{done.stdout}"
        return done.stdout

    def find(self, *words: str) -> list[int]:
        """Return the processes here whose command has all the words, by their numbers outside."""
        found = []
        here = os.readlink(f"/proc/{self._pid()}/ns/pid")
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if os.readlink(place / "ns/pid") == here and set(words) <= set(command):
                    found.append(int(place.name))
        return sorted(found)

    def kill_all(self) -> None:
        """Kill all that runs here but the host itself, as if its power had failed."""
        # -1 reaches all processes of the namespace but its first, and the one that asks.
        self.run(sys.executable, "-c", "import os, signal; os.kill(-1, signal.SIGKILL)")

    def up(self, hosts: str) -> None:
        """Make the namespaces. hosts: what stands in /etc/hosts here."""
        self.names.parent.mkdir(parents=True)
        self.names.write_text(hosts)
        _ip("netns", "add", self.space)
        _ip("-n", self.space, "link", "set", "lo", "up")
        # Ended with this program, also where that is killed; and everything here with it.
        tied = ("setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.space)
        spaces = ("--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        first = [*tied, "unshare", *spaces, "bash", "-c", _FIRST, self.name]
        # unshare complains of a signal mask when its child is killed, which is how a host ends.
        self._first = subprocess.Popen(first, stderr=subprocess.DEVNULL)
        wait_until(lambda: self._pid() is not None, f"{self.name} does not start")
        into = ("--net", "--uts", "--pid", "--mount")
        self._prefix = ["nsenter", "-t", str(self._pid()), *into, f"--wd={ROOT}"]

    def down(self) -> None:
        """End every process here and remove the namespaces."""
        if self._first is not None:
            if (pid := self._pid()) is not None:
                os.kill(pid, signal.SIGKILL)
            self._first.kill()
            self._first.wait()
        known = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        if self.space in [line.split()[0] for line in known.splitlines()]:
            _ip("netns", "delete", self.space)
        shutil.rmtree(self.names.parent, ignore_errors=True)

    def _pid(self) -> int | None:
        """The first process of this host, as this program numbers it."""
        parent = self._first.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(children[0]) if children else None


@contextlib.contextmanager
def two_hosts(*names: str, aliases: Sequence[str] = ("", "")) -> Iterator[tuple[Host, Host]]:
    """Make two hosts joined by a cable, for the time of a block. aliases: other names of each."""
    one, two = hosts = tuple(Host(name, i + 1) for i, name in enumerate(names))
    lines = [f"{h.address} {h.name} {a}" for h, a in zip(hosts, aliases, strict=True)]
    try:
        for host in hosts:
            host.down()  # what a killed run of this program has left
            host.up("\n".join(["127.0.0.1 localhost", *lines, ""]))
        ends = ("link", "add", "cable0", "netns", one.space, "type", "veth")
        _ip(*ends, "peer", "name", "cable0", "netns", two.space)
        for host in hosts:
            _ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", "cable0")
            _ip("-n", host.space, "link", "set", "cable0", "up")
        yield one, two
    finally:
        for host in hosts:
            host.down()


def require(programs: Mapping[str, str]) -> None:
    """End this program unless it is root's and has these programs. programs: -> Debian package."""
    if os.geteuid() != 0:
        sys.exit("this makes hosts (network and process namespaces), which only root may: use sudo")
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = {p: package for p, package in programs.items() if not shutil.which(p, path=path)}
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        sys.exit(f"not installed: {', '.join(missing)}; on Debian: apt-get install {packages}")
    os.environ["PATH"] = path


def wait_until(happened: Callable[[], bool], else_says: str, alive: Sequence = ()) -> None:
    """Poll until something happened. alive: processes that must not end before."""
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        ended = [process for process in alive if process.poll() is not None]
        assert not ended, f"{else_says}: {ended[0].args} has ended with {ended[0].returncode}"
        assert time.monotonic() < deadline, f"{else_says} within {TIMEOUT} s"
        time.sleep(0.02)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
