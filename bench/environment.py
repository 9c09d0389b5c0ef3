"""Where a measurement was made: machine, versions, commit, load."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUIET = 0.3
"""Other programs' share of one core above which a measurement counts as made under load."""


def describe(versions: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return the environment of a run; versions: of each side's libraries."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gb": _memory_gb(),
        "system": platform.system(),
        "python": platform.python_version(),
        "accelerator": gpu() or "none",
        "load_at_start": load(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def gpu() -> str:
    """Return name and driver of the first NVIDIA GPU; "" where nvidia-smi finds none."""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return ""
    name, _, driver = lines[0].partition(", ")
    return f"{name}, driver {driver}"


def cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    """Return the one-minute load average."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def busy_cores(seconds: float = 0.5) -> float:
    """Measure how many cores other programs use right now; 0 where /proc does not say."""
    before = busy_seconds()
    time.sleep(seconds)
    return round(max(0.0, (busy_seconds() - before) / seconds), 2)


def busy_seconds() -> float:
    """Return the seconds that all cores were busy since the machine began; 0 without /proc."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:]]
    idle, stolen = ticks[3] + ticks[4], ticks[7]
    return (sum(ticks[:8]) - idle - stolen) / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError):
        return float("nan")


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "mmjax", "bench")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except OSError:
        return "unknown"
