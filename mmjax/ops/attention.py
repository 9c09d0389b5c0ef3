"""The one attention of mmjax: softmax(q k^T) v where each query sees one range of keys.

``attention`` is the dispatch; the implementations stand in ``flash_*.py``.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from mmjax.ops import flash_xla
from mmjax.parallel import context
from mmjax.parallel.sharding import spec

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
    run = functools.partial(flash_xla.flash_attention, scale=scale)
    return _on_each_device(run, q, k, v, ranges, alibi_slopes, causal)


def _on_each_device(run, q, k, v, ranges, slopes, causal):
    """Run on each device's own rows and heads: a loop over rows must not cross devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q, k, v, ranges, slopes, causal=causal)
    (batch, *_, heads, _), kv_heads = spec("batch", None, "heads", None), spec("kv_heads")[0]
    ways = math.prod(mesh.shape[axis] for axis in batch)
    if q.shape[0] % ways or k.shape[2] % mesh.shape[kv_heads]:
        # a generation batch smaller than the mesh
        return run(q, k, v, ranges, slopes, causal=causal)
    length, local = None, functools.partial(run, causal=causal)
    if q.shape[1] == k.shape[1] and context.length_shards(q.shape[1], q.shape[0]) > 1:
        length, local = context.AXIS, functools.partial(_with_all_keys, run, causal=causal)
        if ranges is None:
            ends = jnp.full(q.shape[:2], k.shape[1], jnp.int32)
            ranges = (jnp.zeros_like(ends), ends)
    q_spec, kv_spec = P(batch, length, heads, None), P(batch, length, kv_heads, None)
    row_spec = None if ranges is None else (P(batch, length),) * 2
    slope_spec = None if slopes is None else P(heads)
    mapped = jax.shard_map(
        local,
        in_specs=(q_spec, kv_spec, kv_spec, row_spec, slope_spec),
        out_specs=q_spec,
        check_vma=False,
    )
    return mapped(q, k, v, ranges, slopes)


def _with_all_keys(run, q, k, v, ranges, slopes, *, causal: bool):
    """Run a device's share of the queries against the keys of all shares.

    The ranges count keys from the start of the row, so they hold as they are; causality, which
    counts queries from the start of the share, goes into their ends. A slope's ``i`` is off by the
    share's start, the same for all keys of a query: softmax does not see it.
    """
    start, end = ranges
    if causal:
        i = context.shard_start(q.shape[1]) + jnp.arange(q.shape[1], dtype=jnp.int32)
        end = jnp.minimum(end, i + 1)
    k, v = (jax.lax.all_gather(x, context.AXIS, axis=1, tiled=True) for x in (k, v))
    return run(q, k, v, (start, end), slopes, causal=False)
