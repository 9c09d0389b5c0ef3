"""The probe suite: what this machine and these versions can do, in seconds and without a peer."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import environment
from bench.cases import Case

DEADLINE = 180
"""Seconds for the whole probe, whatever the other suites may take."""


def probe_cases(quick: bool, device: str) -> list[Case]:
    """Return the one case of the probe."""
    matmul, copy_mb = (8192, 2048) if device == "gpu" else (1024, 256)
    if quick:
        matmul, copy_mb = 256, 8
    options = {"matmul": matmul, "copy_mb": copy_mb}
    return [Case("probe", device, options, work=0, unit="", bound=0, peers=(), device=device)]


class Probe:
    """Runs each attention, and measures the most that matmuls and copies reach."""

    def __init__(self, case: Case, folder: str, impl: str):
        self.case = case

    def survey(self) -> dict[str, Any]:
        """Return versions, devices, the attentions that run, and the ceilings."""
        import jax

        gpu = self.case.device == "gpu"
        names = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax",
                 "numpy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # fmt: skip
        return {
            "versions": {"python": platform.python_version(), **environment.versions(*names)},
            "device_kind": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "attention": attentions(("float32", "bfloat16") if gpu else ("float32",)),
            "matmul_dtype": "bfloat16" if gpu else "float32",
            "matmul_gflop_s": round(self._matmul("bfloat16" if gpu else "float32"), 1),
            "copy_gb_s": round(self._copy(), 2),
        }

    def _matmul(self, dtype: str) -> float:
        import jax

        n = self.case.options["matmul"]
        a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
        return 2 * n**3 / fastest(jax.jit(lambda a, b: a @ b), a, b) / 1e9

    def _copy(self) -> float:
        """Read and write a large array; both directions count."""
        import jax

        numbers = self.case.options["copy_mb"] * 2**20 // 4
        x = jax.random.normal(jax.random.key(2), (numbers,), "float32")
        # Not an identity, which would hand its argument back.
        return 2 * x.nbytes / fastest(jax.jit(lambda x: -x), x) / 1e9


def fastest(function: Callable, *arguments) -> float:
    """Return the seconds of the fastest call, of calls in batches that hide their dispatch."""
    import jax

    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(4):
            found = function(*arguments)
        jax.block_until_ready(found)
        times.append((time.perf_counter() - begun) / 4)
    return min(times)


def attentions(dtypes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Run a small causal case through every implementation, forward and backward.

    Returns {implementation: {dtype: error}}: the largest difference from float64 over the largest
    value, of the output and the three gradients; or the message, in one line, of what kept the
    implementation from running.
    """
    from mmjax.ops.attention import IMPLEMENTATIONS

    rng = np.random.default_rng(5)
    arrays = [rng.standard_normal((1, 128, 2, 64)) for _ in range(4)]
    found: dict[str, dict[str, Any]] = {}
    for name in IMPLEMENTATIONS:
        found[name] = {}
        for dtype in dtypes:
            try:
                found[name][dtype] = _error(name, dtype, arrays)
            except Exception as problem:  # whatever a compiler raises is the answer
                text = " ".join(str(problem).split())
                found[name][dtype] = f"{type(problem).__name__}: {text}"[:300]
    return found


def _error(implementation: str, dtype: str, arrays: list[np.ndarray]) -> float:
    import jax
    import jax.numpy as jnp

    from mmjax.ops.attention import attention

    given = [jnp.asarray(x, dtype) for x in arrays]
    rounded = [np.asarray(x.astype("float32"), np.float64) for x in given]

    @jax.jit
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(lambda *a: attention(*a, implementation=implementation), q, k, v)
        return out, *pull(cotangent)

    pairs = zip(run(*given), reference(*rounded), strict=True)
    errors = [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in pairs]
    return float(np.max(errors))


def reference(q, k, v, cotangent) -> tuple[np.ndarray, ...]:
    """Return causal attention in float64 and the gradients of q, k, v; all [b, t, n, h]."""
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("btnh,bsnh->bnts", cotangent, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bnts,bsnh->btnh", p, v),
        np.einsum("bnts,bsnh->btnh", ds, k),
        np.einsum("bnts,btnh->bsnh", ds, q),
        np.einsum("bnts,btnh->bsnh", p, cotangent),
    )
