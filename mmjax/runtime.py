"""What a process is given before JAX starts: pages and memory, XLA's flags, the compilation cache.

The shells (train.py, eval.py) call ``prepare`` first. A program of your own may do the same before
it touches JAX, or set the variables itself: what is set already is left alone, and
``MMJAX_RUNTIME=off`` leaves all of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmjax import user_cache

USABLE = 0.92
"""The share of a device's memory that a run may fill: drivers and libraries need some too."""

PAGES = "glibc.malloc.hugetlb=1"
"""The tunable that makes malloc ask for huge pages; of glibc from 2.35 on."""

ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")

SEVERAL_GPUS = {
    # Communication beside computation: what JAX's and XLA's guides to GPUs advise. They do nothing
    # for one device but cost memory, so one device does without.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    "--xla_gpu_enable_pipelined_all_gather": "true",
    "--xla_gpu_enable_pipelined_reduce_scatter": "true",
    "--xla_gpu_enable_pipelined_all_reduce": "true",
    "--xla_gpu_enable_while_loop_double_buffering": "true",
    # A layer's weights travel in one message.
    "--xla_gpu_all_gather_combine_threshold_bytes": str(512 * 2**20),
    "--xla_gpu_reduce_scatter_combine_threshold_bytes": str(512 * 2**20),
    "--xla_gpu_all_reduce_combine_threshold_bytes": str(512 * 2**20),
}
"""XLA's flags for runs on more than one GPU."""

_PINNED = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GPUS = Path("/proc/driver/nvidia/gpus")


def prepare() -> None:
    """Set what this process lacks; where only a new process reads it, begin again as one.

    glibc reads its tunables when a program is loaded, so a CPU run replaces itself once, before
    anything is imported, with the same arguments and the same process id.
    """
    if os.environ.get("MMJAX_RUNTIME") == "off":
        return
    more = environment(os.environ)
    os.environ.update(more)
    if "GLIBC_TUNABLES" in more:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)


def environment(have: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a process with the variables ``have`` should also have.

    GLIBC_TUNABLES, on a Linux that gives huge pages to those who ask, without an accelerator: on a
    CPU the buffers of a train step are new memory in every step, and taking it in small pages costs
    a part of the step. On a GPU XLA_PYTHON_CLIENT_MEM_FRACTION: JAX would take three quarters of it
    and leave the rest; a run takes ``USABLE``. XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB: a checkpoint
    passes through a pool of the host's memory that ends at 64 GB, and a larger state could not be
    saved; here it may grow to all there is. XLA_FLAGS, where there are several GPUs:
    ``SEVERAL_GPUS``, as far as this jaxlib knows them.
    """
    more = {}
    tunables = have.get("GLIBC_TUNABLES", "")
    if on_cpu(have) and "glibc.malloc.hugetlb" not in tunables and _gives_huge_pages():
        more["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, PAGES)))
    own = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"
    if not on_cpu(have) and not any(name in have for name in own):
        more["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{USABLE:g}"
    # A pool that is taken at once, which is asked for by another variable, has its own limit.
    own = _PINNED, "XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE"
    if not on_cpu(have) and not any(name in have for name in own):
        more[_PINNED] = str(host_memory() // 2**30)
    if not on_cpu(have) and _count_gpus(have) > 1:
        given = have.get("XLA_FLAGS", "")
        wanted = {k: v for k, v in SEVERAL_GPUS.items() if k not in given}
        flags = [f"{name}={wanted[name]}" for name in known_flags(wanted)]
        if flags:
            more["XLA_FLAGS"] = " ".join(filter(None, (given, *flags)))
    return more


def host_memory() -> int:
    """Return the bytes of this host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def on_cpu(have: Mapping[str, str]) -> bool:
    """Tell whether JAX will run on the CPU, from its variable and the plugins installed."""
    platforms = have.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ACCELERATORS)


def known_flags(names: Iterable[str]) -> list[str]:
    """Return those of XLA's flags that the installed jaxlib knows; others would end the process.

    A process of its own is asked, once for each version of jaxlib: the answer is kept in the cache.
    """
    names = list(names)
    version = importlib.metadata.version("jaxlib")
    file = user_cache.folder("xla_flags", f"jaxlib-{version}.json")
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    if asked := [name for name in names if name not in known]:
        unknown = _unknown(asked)
        known |= {name: name not in unknown for name in asked}
        part = file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
            part.replace(file)
        except OSError:
            pass  # it is asked again next time
    return [name for name in names if known[name]]


def _unknown(names: list[str]) -> set[str]:
    """Ask a new process which flags its XLA does not know."""
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(f"{name}=1" for name in names)}
    code = "import jax; jax.devices()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True
    )
    if done.returncode == 0:
        return set()
    told = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", done.stderr)
    unknown = {flag.split("=")[0] for flag in told.group(1).split()} if told else set(names)
    return unknown & set(names) or set(names)


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, unless the user has chosen otherwise."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache.folder("jax")))


def _gives_huge_pages() -> bool:
    """Tell whether malloc's asking changes anything: glibc knows how, and the kernel listens."""
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    try:
        return "[madvise]" in _THP.read_text("utf-8")
    except OSError:
        return False


def _count_gpus(have: Mapping[str, str]) -> int:
    """Count the GPUs of this run: of all its processes where there are several, at least two."""
    processes = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(have.get(name, "1") not in ("", "1") for name in processes):
        return 2
    visible = have.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([x for x in visible.split(",") if x.strip() not in ("", "-1")])
    return len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
