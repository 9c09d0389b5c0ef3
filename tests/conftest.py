"""Eight simulated devices, float32 matmuls and a compilation cache for the whole suite."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Many small programs take longer to compile than to run: they are left unoptimised and in one piece
# (XLA would give each to several threads), without the library that makes programs of its own of
# matmuls and sums (compiler_options.py); those of the processes that tests start too. The older
# emitters of fused loops compile in half the time of today's, which is all that later XLAs have.
# Flags that are given count; `make parity` optimises.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_experimental_ynn_fusion_type="
    f"{' --xla_cpu_use_fusion_emitters=false' * version('jaxlib').startswith('0.10.')}",
)
# Nobody reads where in the source an operation of a test's program came from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache/jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000  # Linux allows a process 65,530; past that XLA ends it


def pytest_collection_finish():
    """What is loaded by now stays, and need not be searched for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def programs_do_not_pile_up():
    """Every compiled program keeps some mappings of memory; thousands of them are too many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def one_device_mesh():
    """A mesh of one device around every test: parameters carry axes and cannot be made without."""
    from mmjax.parallel.mesh import use

    with use() as mesh:
        yield mesh
