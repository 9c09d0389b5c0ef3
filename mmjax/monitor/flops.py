"""What the hardware could do at best, to compare a run with."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

# Dense (not sparse) bfloat16 matmul FLOP/s with float32 accumulation, from the makers' data
# sheets; the first name that ends a word of the device kind counts, so special ones stand first.
_BF16_PEAKS = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("h800", 989e12),
    ("gh200", 989e12),
    ("b200", 2250e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("a10g", 70e12),
    ("a10", 125e12),
    ("l40s", 362e12),
    ("l4", 121e12),
    ("rtx 4090", 165e12),
    ("tpu v6", 918e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5", 459e12),
    ("tpu v4", 275e12),
)
_FLOAT32_SHARE = 0.5  # jax multiplies float32 in TF32 on these GPUs, at half the bfloat16 rate

MEASURED = "measured"


@dataclasses.dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices together, and how it is known: ``data sheet`` or MEASURED."""

    flops: float
    source: str


def table_peak(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Return the data-sheet FLOP/s of one device by its kind, None when it is not in the table."""
    kind = device_kind.lower()
    for name, flops in _BF16_PEAKS:
        if re.search(rf"{name}\b", kind):  # "l4" is not an L40
            return flops * (_FLOAT32_SHARE if dtype == "float32" else 1.0)
    return None


def find_peak(devices: Any = None, dtype: str = "bfloat16", *, measure: bool = True) -> Peak | None:
    """Return the peak of some devices (all by default), or None where nothing is known.

    A CPU has no number of its own: a large matmul is timed instead, and simulated devices share
    it, so that MFU there means "share of what XLA's own matmul reaches".
    """
    import jax

    devices = list(jax.devices() if devices is None else devices)
    per_device = table_peak(devices[0].device_kind, dtype)
    if per_device is not None and devices[0].platform != "cpu":
        return Peak(per_device * len(devices), "data sheet")
    if devices[0].platform == "cpu" and measure:
        return Peak(measure_matmul(dtype), MEASURED)
    return None


def measure_matmul(dtype: str = "float32", size: int = 1024, repeats: int = 4) -> float:
    """Time a square matmul on the default device; return the best FLOP/s of a few tries."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((size, size), dtype)
    multiply(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
