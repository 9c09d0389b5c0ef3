"""What a process is given before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmjax import runtime

ROOT = Path(__file__).parents[1]
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
PINNED, GPU = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", {"JAX_PLATFORMS": "cuda"}


@pytest.fixture(autouse=True)
def pages(monkeypatch):
    monkeypatch.setattr(runtime, "_gives_huge_pages", lambda: True)
    monkeypatch.setattr(runtime, "host_memory", lambda: 900 * 2**30)


@pytest.mark.parametrize(
    "have, more",
    [
        ({"JAX_PLATFORMS": "cpu"}, {"GLIBC_TUNABLES": runtime.PAGES}),
        (
            {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.check=1"},
            {"GLIBC_TUNABLES": f"glibc.malloc.check=1:{runtime.PAGES}"},
        ),
        ({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {}),
        (GPU | {"CUDA_VISIBLE_DEVICES": "0"}, {MEMORY: "0.92", PINNED: "900"}),
        ({"JAX_PLATFORMS": "cuda,cpu", MEMORY: ".5"}, {PINNED: "900"}),
        (GPU | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", PINNED: "8"}, {}),
        (GPU | {"XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE": "true"}, {MEMORY: "0.92"}),
    ],
)
def test_a_cpu_run_asks_for_huge_pages_and_a_gpu_run_for_memory_unless_told(have, more):
    assert runtime.environment(have) == more


def test_nothing_is_asked_of_a_system_that_has_no_such_pages(monkeypatch):
    monkeypatch.setattr(runtime, "_gives_huge_pages", lambda: False)
    assert runtime.environment({"JAX_PLATFORMS": "cpu"}) == {}


@pytest.mark.parametrize(
    "several", [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"SLURM_STEP_NUM_TASKS": "16"}]
)
def test_several_gpus_get_the_flags_that_are_known_and_not_given(several, monkeypatch):
    given, unknown = "--xla_gpu_enable_latency_hiding_scheduler=false", "pipelined_all_reduce"
    monkeypatch.setattr(
        runtime, "known_flags", lambda names: [n for n in names if unknown not in n]
    )
    more = runtime.environment({**GPU, "XLA_FLAGS": given, **several})
    first, *flags = more.pop("XLA_FLAGS").split()
    assert first == given and more == {MEMORY: "0.92", PINNED: "900"}
    names = [flag.split("=")[0] for flag in flags]
    skipped = {"--xla_gpu_enable_latency_hiding_scheduler", f"--xla_gpu_enable_{unknown}"}
    assert set(names) == set(runtime.SEVERAL_GPUS) - skipped and len(names) == len(set(names))


def test_flags_are_asked_of_the_installed_xla_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = [*runtime.SEVERAL_GPUS, "--xla_gpu_no_such_flag", "--xla_gpu_nor_this"]
    assert runtime.known_flags(names) == list(runtime.SEVERAL_GPUS)
    monkeypatch.setattr(runtime, "_unknown", lambda _: pytest.fail("it was asked again"))
    assert runtime.known_flags(names) == list(runtime.SEVERAL_GPUS)


@pytest.mark.parametrize("off", [False, True])
def test_a_process_begins_again_as_itself(off):
    code = (
        "import os, sys; from mmjax import runtime; runtime._gives_huge_pages = lambda: True;"
        "runtime.prepare(); print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"
    )
    variables = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    variables |= {"JAX_PLATFORMS": "cpu"} | ({"MMJAX_RUNTIME": "off"} if off else {})
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--a", "b c"],
        cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.strip() == f"{process.pid} {None if off else runtime.PAGES} ['--a', 'b c']"
