"""H200s that are not there, to compile for; everything that JAX does not promise stands here.

JAX's CUDA plugin makes devices out of a description of a GPU (``jax.experimental.topologies``):
programs are compiled for them as for real ones, and nothing can run on them. The plugin and the
assembler that it calls are wheels of PyPI; see ``compile-h200`` in the Makefile.
"""

import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

# The plugin asks for cuDNN and a driver as it is imported; compiling needs neither of them.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
# Autotuning runs candidates on the device and takes the fastest; there is nothing to run them on.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
# XLA tells of ptxas's warnings, such as registers spilled, at this level; see ``log_to``.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"

import jax
from jax.experimental import topologies

from mmjax.ops import implementations

MEMORY_GB = 141
"""Of a device, as ``--plan_memory`` takes it."""

# XLA's GpuTargetConfigProto, in text: what its passes and cost models ask a device for.
_TARGET = f"""
gpu_device_info {{
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  device_memory_size: {MEMORY_GB * 10**9} memory_bandwidth: 4800000000000
  l2_cache_size: 52428800 device_address_bits: 64
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H200"
"""


def devices(count: int) -> list[jax.Device]:
    """Return so many H200s of one machine, to compile for."""
    name = f"1x1x{count}"  # slices, machines of a slice, GPUs of a machine
    found = topologies.get_topology_desc("h200", "cuda", target_config=_TARGET, topology=name)
    return list(found.devices)


@contextlib.contextmanager
def taken_for_default():
    """Within, mmjax chooses its attention and its layouts as on a machine with such GPUs.

    The default backend stays the CPU, so what is tried out on the device before it is chosen
    (cuDNN's attention) fails there, and the next choice is taken.
    """
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(implementations, "capability", lambda: 9.0),
    ):
        yield


@contextlib.contextmanager
def assembler_reports(folder: Path):
    """Write what ptxas says into a folder: all of it of Mosaic's kernels, XLA's warnings."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    told = dict(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=str(folder))
    with mock.patch.dict(os.environ, told), log_to(folder / "xla.ptxas"):
        yield


@contextlib.contextmanager
def log_to(path: Path):
    """Send stderr, also that of compiled code, to a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("w") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
