"""The probe suite: what this machine and these versions can do, in seconds and without a peer.

Each implementation of attention is a case of its own: one that hangs or breaks the device then
costs its own row, and the next starts in a new process.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import environment
from bench.cases import Case

DEADLINE = 300
"""Seconds for the whole probe, whatever the other suites may take."""
SECONDS = 75
"""For one case."""
IMPLEMENTATIONS = ("auto", "xla", "triton", "mosaic", "cudnn")
"""As ``mmjax.ops.attention`` has them, in the order of trust; named here, for that imports jax."""
HEAD_DIMS = (64, 72, 80, 96, 128)
BOUND = 2e-2
"""Of the error in bfloat16: largest difference over largest value, of output and gradients."""


def probe_cases(quick: bool, device: str) -> list[Case]:
    """Return the case of versions and ceilings, and one for each implementation of attention."""
    gpu = device == "gpu"
    matmul, copy_mb = (8192, 2048) if gpu else (1024, 256)
    if quick:
        matmul, copy_mb = 256, 8
    options = [(device, {"matmul": matmul, "copy_mb": copy_mb})]
    for name in IMPLEMENTATIONS:
        # Packed rows too where kernels are compiled; interpreted ones take seconds each.
        dims = HEAD_DIMS if gpu and not quick and name != "cudnn" else ()
        options.append((f"{device}, attention {name}", {"attention": name, "head_dims": dims}))
    about = dict(work=0, unit="", bound=BOUND, peers=(), device=device, seconds=SECONDS)
    return [Case("probe", name, some, **about) for name, some in options]


class Probe:
    """Measures the most that matmuls and copies reach, or runs one implementation of attention."""

    def __init__(self, case: Case, folder: str, impl: str):
        self.case = case

    def survey(self) -> dict[str, Any]:
        """Return versions, devices and ceilings, or the errors of an implementation."""
        gpu = self.case.device == "gpu"
        if "attention" in self.case.options:
            dtypes = ("bfloat16", "float32") if gpu else ("float32",)
            return attention_errors(
                self.case.options["attention"], dtypes, self.case.options["head_dims"]
            )
        import jax

        names = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax",
                 "numpy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # fmt: skip
        return {
            "versions": {"python": platform.python_version(), **environment.versions(*names)},
            "device_kind": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
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


def attention_errors(
    name: str, dtypes: tuple[str, ...], head_dims: tuple[int, ...]
) -> dict[str, Any]:
    """Run an implementation forward and backward beside float64.

    A causal case of 128 tokens in each dtype; then, for each head dim, 331 tokens in packed rows
    with padding, grouped heads and ALiBi in the first dtype. float32 is multiplied as float32.
    Returns {"attention": {name: {case: error}}, "errors": the numbers alone}, an error being the
    largest difference over the largest value of the output and the three gradients, or what an
    implementation cannot do, in one line. Raises what a compiler or a device raises.
    """
    found: dict[str, Any] = {}
    cases = [(dtype, (dtype, 64, False)) for dtype in dtypes]
    cases += [(f"{dtypes[0]}, packed, head dim {h}", (dtypes[0], h, True)) for h in head_dims]
    for case, asked in cases:
        try:
            found[case] = _error(name, *asked)
        except ValueError as problem:  # an explicit choice that cannot do the call
            found[case] = " ".join(str(problem).split())[:300]
    numbers = {case: x for case, x in found.items() if not isinstance(x, str)}
    return {"attention": {name: found}} | ({"errors": numbers} if numbers else {})


def _error(implementation: str, dtype: str, h: int, packed: bool) -> float:
    import jax
    import jax.numpy as jnp

    from mmjax.ops import ranges
    from mmjax.ops.attention import attention

    b, t, n, kv = (2, 331, 4, 2) if packed else (1, 128, 2, 2)
    rng = np.random.default_rng(5)
    shapes = (b, t, n, h), (b, t, kv, h), (b, t, kv, h), (b, t, n, h)
    given = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    exact = [np.asarray(x.astype("float32"), np.float64) for x in given]
    start, end = np.zeros((b, t), np.int32), np.tile(np.arange(1, t + 1, dtype=np.int32), (b, 1))
    slopes = None
    if packed:
        # Two documents and padding, then three.
        segments = np.repeat([[1, 2, 0], [1, 2, 3]], [100, 170, 61], axis=1)
        own = [np.asarray(x) for x in ranges.from_segments(jnp.asarray(segments))]
        start, end = own[0], np.minimum(own[1], end)
        slopes = 2.0 ** -np.arange(1, n + 1, dtype=np.float32)
    masks = (start, end) if packed else (None, None)

    @jax.jit
    def run(q, k, v, cotangent):
        def attend(q, k, v):
            return attention(
                q, k, v, k_start=masks[0], k_end=masks[1], alibi_slopes=slopes,
                implementation=implementation,
            )  # fmt: skip

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    with jax.default_matmul_precision("float32"):
        got = run(*given)
    pairs = zip(got, reference(*exact, start, end, slopes), strict=True)
    errors = [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in pairs]
    return float(np.max(errors))


def reference(q, k, v, cotangent, start=None, end=None, slopes=None) -> tuple[np.ndarray, ...]:
    """Return attention in float64 and the gradients of q, k, v; [b, t, n, h], fewer heads in k, v.

    start, end: int[b, t], the keys that each query sees, none of them giving 0; None is causal.
    slopes: [n], of ALiBi, or None.
    """
    (b, t, n, h), (s, kv) = q.shape, k.shape[1:3]
    if start is None:
        start, end = np.zeros((b, t), int), np.tile(np.arange(1, t + 1), (b, 1))
    k, v = (np.repeat(x, n // kv, axis=2) for x in (k, v))
    scale, at = h**-0.5, np.arange(s)
    scores = np.einsum("btnh,bsnh->bnts", q, k) * scale
    if slopes is not None:
        scores -= np.float64(slopes)[:, None, None] * (np.arange(t)[:, None] - at)
    seen = ((at >= start[..., None]) & (at < end[..., None]))[:, None]
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    dp = np.einsum("btnh,bsnh->bnts", cotangent, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    dk, dv = (
        np.einsum("bnts,btnh->bsnh", *pair).reshape(b, s, kv, n // kv, h).sum(3)
        for pair in ((ds, q), (p, cotangent))
    )
    return np.einsum("bnts,bsnh->btnh", p, v), np.einsum("bnts,bsnh->btnh", ds, k), dk, dv
