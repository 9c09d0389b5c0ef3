"""The implementations of attention: what each cannot do, and which one a call gets.

Each is a module with ``flash_attention(q, k, v, ranges, alibi_slopes, *, causal, scale)``, whose
contract is that of ``mmjax.ops.attention.attention``, and ``problem(call)``, which tells what keeps
it from a ``Call``. A new one is an entry of ``TABLE``, and a place in ``PREFERRED`` once it is
proven where it runs.
"""

import dataclasses
import functools
import importlib
import logging
from types import ModuleType

import jax

from mmjax.parallel import context


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Where an implementation stands, and how it may be called.

    partitions: XLA can cut it over devices by itself; for a kernel it would gather all. probed:
    whether it runs is only known once it ran on this process's devices.
    """

    module: str
    partitions: bool = False
    probed: bool = False


TABLE = {
    "xla": Implementation("mmjax.ops.flash_xla", partitions=True),
    "triton": Implementation("mmjax.ops.flash_triton"),
    "mosaic": Implementation("mmjax.ops.flash_mosaic"),
    "cudnn": Implementation("mmjax.ops.flash_cudnn", probed=True),
}
# Of ``auto`` on a CUDA GPU, the first that can do the call; see docs/design.md for the reasons.
# Mosaic's kernels are not among them: they have never run on a GPU.
PREFERRED = ("cudnn", "triton", "xla")
# Below this many queries a block of a kernel would be mostly padding.
MIN_KERNEL_QUERIES = 16
# GPUs from here on have bfloat16 tensor cores (Ampere and later).
MIN_CAPABILITY = 8.0


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call while it is traced.

    q, k, v: arrays, or their shapes and dtypes. ranges: whether queries have ranges of keys.
    causal: as in ``attention``. slopes: whether there is ALiBi.
    """

    q: jax.Array | jax.ShapeDtypeStruct
    k: jax.Array | jax.ShapeDtypeStruct
    v: jax.Array | jax.ShapeDtypeStruct
    ranges: bool = False
    causal: bool = True
    slopes: bool = False

    @property
    def length_shards(self) -> int:
        """Into how many shares the mesh in use cuts the queries; each then sees all keys."""
        b, t = self.q.shape[:2]
        return context.length_shards(t, b) if t == self.k.shape[1] else 1

    def dtype_problem(self, known: tuple[str, ...]) -> str | None:
        """Tell what is wrong with the dtypes where all three must be the same one of ``known``."""
        dtypes = [x.dtype.name for x in (self.q, self.k, self.v)]
        if len(set(dtypes)) == 1 and dtypes[0] in known:
            return None
        return f"q, k, v are {', '.join(dtypes)}; cast them to one of {', '.join(known)}"


@functools.cache
def capability() -> float | None:
    """Return the compute capability of the CUDA GPUs in use; None where the backend is another."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return None
    return float(device.compute_capability)


def load(name: str) -> ModuleType:
    """Return the module of an implementation; imported here, for Pallas is slow to import."""
    return importlib.import_module(TABLE[name].module)


def problem(name: str, call: Call) -> str | None:
    """Tell what keeps an implementation from a call; None if nothing does."""
    try:
        return load(name).problem(call)
    except ImportError as error:
        return f"this jax ({jax.__version__}) lacks what it is written in ({error})"


def own_problem(name: str, dtype: str, ranges: bool = False) -> str | None:
    """Tell what keeps an implementation from even an easy call of a dtype, on this backend."""
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), dtype)
    return None if name == "auto" else problem(name, Call(x, x, x, ranges))


def choose(implementation: str, call: Call) -> str:
    """Return the implementation to run; raise ValueError if the named one cannot."""
    if implementation == "auto":
        return _automatic(call)
    if found := problem(implementation, call):
        works = " or ".join(f'"{name}"' for name in _candidates(call) if not problem(name, call))
        raise ValueError(
            f'attention implementation "{implementation}" cannot run: {found}; {works} would work'
        )
    return implementation


def _candidates(call: Call) -> tuple[str, ...]:
    """Return what may be chosen on this backend for so many queries, the preferred one first."""
    found = capability()
    kernels = found is not None and found >= MIN_CAPABILITY
    return PREFERRED if kernels and call.q.shape[1] >= MIN_KERNEL_QUERIES else ("xla",)


def _automatic(call: Call) -> str:
    found = capability()
    if found is None:
        return _say("xla", f"the backend is {jax.default_backend()}")
    if found < MIN_CAPABILITY:
        return _say("xla", f"compute capability {found} is below {MIN_CAPABILITY}")
    if call.q.shape[1] < MIN_KERNEL_QUERIES:
        return _say("xla", f"fewer than {MIN_KERNEL_QUERIES} queries")
    passed = []
    for name in PREFERRED:
        # All processes must trace the same program, and a probe may fail on one of them alone.
        apart = TABLE[name].probed and jax.process_count() > 1
        why = "not among several processes, by auto" if apart else problem(name, call)
        if why is None:
            return _say(name, "; ".join(["the backend is a CUDA GPU", *passed]))
        passed.append(f"not {name}: {why}")
    raise AssertionError("flash_xla does every call")


@functools.cache
def _say(chosen: str, reason: str) -> str:
    """Return the choice; log it the first time it is made for this reason."""
    logging.getLogger(__name__).info("attention runs as %s: %s", chosen, reason)
    return chosen
