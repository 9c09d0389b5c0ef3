"""Attention by cuDNN, through ``jax.nn.dot_product_attention``, where it knows the mask.

cuDNN fuses causality, or no mask at all; a mask given as an array would be a bias of t x s numbers,
which is never passed here. So calls with ranges of keys are refused: what is left are vision
towers, resamplers, and prompts that are read into a cache. JAX refuses odd lengths where a gradient
is asked for (it takes its own placeholder for a bias), and towers have 577 or 729 tokens: such
arrays are padded by one, which costs a copy, and the number of keys that count is passed with them.

Whether cuDNN's attention works depends on the versions of CUDA and cuDNN beside JAX's (jax issue
32430: none of it with some CUDA 13). ``trouble`` tries it, once for each kind of call.

Its forward pass is JAX's own and carries no checkpoint names. ``keeps_residuals`` is the policy
that saves what it returns, output and statistics, by the name of its primitive;
``mmjax.nn.stack`` joins it to its names, so that rematerialisation does not run the kernel again.
The backward pass adds in no fixed order, unless XLA is told to be deterministic
(``--xla_gpu_deterministic_ops``): gradients may differ in their last bits from run to run.
"""

import concurrent.futures
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mmjax.ops import flash_xla, implementations

DTYPES = ("bfloat16", "float16")
PROBE_BOUND = 2e-2
"""Of the probe's error: largest difference over largest value, of output and each gradient."""


def flash_attention(q, k, v, ranges, alibi_slopes, *, causal: bool, scale: float) -> Array:
    """Compute attention; the contract is that of ``mmjax.ops.attention.attention``.

    Raises ValueError for ranges and slopes: ``problem`` tells of them before.
    """
    if ranges is not None or alibi_slopes is not None:
        raise ValueError("cuDNN's attention was given ranges of keys or ALiBi slopes")
    (b, t), s, lengths = q.shape[:2], k.shape[1], None
    if _kind(s, causal) == "odd":
        lengths = jnp.full((b,), s, jnp.int32)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=float(scale), is_causal=causal, key_value_seq_lengths=lengths,
        implementation="cudnn",
    )  # fmt: skip
    return out[:, :t]


def _kind(s: int, causal: bool) -> str:
    """Tell which of cuDNN's masks a call needs: causality hides a padded key by itself."""
    return "causal" if causal else "odd" if s % 2 else "whole"


def keeps_residuals(primitive, *_, **__) -> bool:
    """Tell, as a policy of ``jax.checkpoint``, whether to save what a primitive returns."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def problem(call: implementations.Call) -> str | None:
    """Tell what keeps cuDNN from a call; None if nothing does. The probe comes last."""
    found = implementations.capability()
    if found is None:
        return f"it needs a CUDA GPU and the backend is {jax.default_backend()}"
    if found < implementations.MIN_CAPABILITY:
        least = implementations.MIN_CAPABILITY
        return f"it needs compute capability {least} and this GPU has {found}"
    if call.slopes:
        return "it knows no ALiBi slopes"
    if call.ranges:
        return "queries have ranges of keys (packed rows, windows, media), and it knows none"
    if call.length_shards > 1:
        return "the mesh cuts the length over context, where causality becomes ranges of keys"
    (t, s), h = (x.shape[1] for x in (call.q, call.k)), call.q.shape[3]
    if call.causal and t != s:
        return f"causal attention of {t} queries to {s} keys; it is asked for equal lengths alone"
    if wrong := call.dtype_problem(DTYPES):
        return wrong
    most = 256 if found >= 9.0 else 128
    if h % 8 or h > most:
        return f"head dim {h} is no multiple of 8, at most {most} on this GPU"
    return trouble(call.q.dtype.name, h, _kind(s, call.causal))


@functools.cache
def trouble(dtype: str, h: int, kind: str) -> str | None:
    """Try cuDNN on a small case, forward and backward; return what went wrong, None for nothing.

    kind: of mask, ``causal``, ``whole``, or ``odd`` numbers of keys; each is tried once a process.
    In a thread of its own: it may be asked for within a trace, under a mesh or in a context of
    settings, all of which belong to the caller's thread.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(_probe, dtype, h, kind).result()
    if found is None:
        return None
    case = f"{dtype}, head dim {h}, {kind}"
    logging.getLogger(__name__).info("cuDNN's attention failed its probe (%s): %s", case, found)
    return f"its probe failed ({case}): {found[:200]}"


def _probe(dtype: str, h: int, kind: str) -> str | None:
    """Compare cuDNN with ``flash_xla`` in float32 on the same rounded numbers."""
    causal, s = kind == "causal", 66 if kind == "whole" else 67
    shapes = ((1, 67, 2, h), (1, s, 1, h), (1, s, 1, h), (1, 67, 2, h))  # grouped heads
    rng = np.random.default_rng(0)
    q, k, v, grad = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)

    def both(attend, q, k, v, grad):
        out, pull = jax.vjp(
            lambda *x: attend(*x, None, None, causal=causal, scale=h**-0.5), q, k, v
        )
        return out, *pull(grad)

    try:
        got = jax.jit(functools.partial(both, flash_attention))(q, k, v, grad)
        got = [np.asarray(x, np.float32) for x in got]
    except Exception as error:  # whatever JAX, XLA or cuDNN raises is the answer
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    exact = (x.astype(jnp.float32) for x in (q, k, v, grad))
    want = jax.jit(functools.partial(both, flash_xla.flash_attention))(*exact)
    for name, a, b in zip(
        ("the output", "dq", "dk", "dv"), got, map(np.asarray, want), strict=True
    ):
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error <= PROBE_BOUND:
            return f"{name} is off by {error:.1e} of its largest value, above {PROBE_BOUND:.0e}"
    return None
