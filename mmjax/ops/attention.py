"""The one attention of mmjax: softmax(q k^T) v where each query sees one range of keys.

``attention`` is the dispatch; the implementations stand in ``flash_*.py``.
"""

import jax.numpy as jnp
from jax import Array

from mmjax.ops import flash_xla

IMPLEMENTATIONS = ("auto", "xla")


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    k_start: Array | None = None,
    k_end: Array | None = None,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: Array | None = None,
    implementation: str = "auto",
) -> Array:
    """Attend from each query to the keys of its range.

    q: [b, t, n, h]; k, v: [b, s, k, h] with n a multiple of k (grouped queries).
    k_start, k_end: int32[b, t]; query i sees keys ``[k_start[i], k_end[i])``, clipped to [0, s];
        None means 0 and s. An empty range gives 0, and zero gradients.
    causal: also hide keys j > i. The index is the place in q and k, not a position id.
    scale: factor on the scores, default ``h ** -0.5``.
    alibi_slopes: float32[n]; adds ``-slope * (i - j)`` to a score (Press et al. 2022).

    Returns [b, t, n, h] in q's dtype. Softmax statistics are float32 whatever the dtype, and no
    array of t x s elements exists, in the forward pass or in the backward one.
    """
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; choose one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if k.shape != v.shape or k.shape[0] != b or k.shape[3] != h or n % kv:
        raise ValueError(
            f"attention shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}; expected "
            "q [b, t, n, h] and k, v [b, s, k, h] with n a multiple of k"
        )
    ranges = None
    if k_start is not None or k_end is not None:
        start = jnp.zeros((b, t), jnp.int32) if k_start is None else k_start
        end = jnp.full((b, t), s, jnp.int32) if k_end is None else k_end
        ranges = (jnp.clip(start, 0, s).astype(jnp.int32), jnp.clip(end, 0, s).astype(jnp.int32))
    scale = h**-0.5 if scale is None else scale
    return flash_xla.flash_attention(q, k, v, ranges, alibi_slopes, causal=causal, scale=scale)
