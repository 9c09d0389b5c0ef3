"""What a process and all its children use, from /proc: processor time and resident memory."""

from __future__ import annotations

import os
from pathlib import Path

_OWN = ("Pss_Anon", "Pss_File")


def tree(pid: int) -> list[int]:
    """List a process and all its living descendants."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue  # the thread has ended
    return found


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants, those that ended included."""
    ticks = 0
    for one in tree(pid):
        try:
            # Behind the name, which may hold anything: state is field 3, utime to cstime 14 to 17.
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> dict[str, float]:
    """Return what a process and its descendants hold now, in MB.

    own_mb: resident pages, those that several processes share counted once; without shared memory.
    shm_mb: all of /dev/shm, whether a process has it mapped or not (and other programs' too).
    """
    own = 0.0
    for one in tree(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in _OWN:
                own += int(value.split()[0]) * 1024 / 1e6
    shm = os.statvfs("/dev/shm")
    shared = (shm.f_blocks - shm.f_bfree) * shm.f_frsize / 1e6
    return {"own_mb": round(own, 1), "shm_mb": round(shared, 1)}


def peak_mb(pid: int) -> float:
    """Return the sum of the most that each living process of a tree ever had resident (VmHWM)."""
    total = 0
    for one in tree(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return round(total * 1024 / 1e6, 1)
