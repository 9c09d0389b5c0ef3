"""The one attention of mmjax: softmax(q k^T) v where each query sees one range of keys.

``attention`` is the entry; ``implementations`` chooses among those in ``flash_*.py``.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from mmjax.ops import implementations
from mmjax.parallel import context
from mmjax.parallel.sharding import several_devices, spec

IMPLEMENTATIONS = ("auto", *implementations.TABLE)


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
    implementation: "xla" everywhere; "triton", kernels for CUDA GPUs, interpreted elsewhere (slow,
        for tests); "mosaic", the same for Hopper alone, by its own instructions, jax 0.11 or newer;
        "cudnn" on CUDA GPUs where it works, without ranges and slopes; "auto" takes the one that
        is preferred where it runs compiled and fits, and says once which.

    Returns [b, t, n, h] in q's dtype, zeros where s is 0. Softmax statistics are float32 whatever
    the dtype, and no array of t x s elements exists, in the forward pass or in the backward one.
    A NaN in a query or key reaches only outputs of queries that see the pair; one in a value
    reaches all that see it, and may reach others of its row and head (0 * NaN). Gradients of a row
    and head with a NaN in them mean nothing.
    Raises ValueError for misfitting shapes and for an implementation that cannot do the call.
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
    ranged = k_start is not None or k_end is not None
    call = implementations.Call(q, k, v, ranged, causal, alibi_slopes is not None)
    chosen = implementations.choose(implementation, call)
    if 0 in (b, t, s):
        return jnp.zeros_like(q)
    ranges = None
    if ranged:
        start = jnp.zeros((b, t), jnp.int32) if k_start is None else k_start
        end = jnp.full((b, t), s, jnp.int32) if k_end is None else k_end
        ranges = (jnp.clip(start, 0, s).astype(jnp.int32), jnp.clip(end, 0, s).astype(jnp.int32))
    scale = h**-0.5 if scale is None else scale
    run = functools.partial(implementations.load(chosen).flash_attention, scale=scale)
    partitions = implementations.TABLE[chosen].partitions
    return _on_each_device(run, q, k, v, ranges, alibi_slopes, causal, partitions)


def _on_each_device(run, q, k, v, ranges, slopes, causal, partitions: bool):
    """Run on each device's own rows and heads: a loop over rows must not cross devices.

    partitions: XLA can cut ``run`` over devices by itself; for a kernel it would gather all.
    """
    if not several_devices():
        return run(q, k, v, ranges, slopes, causal=causal)
    mesh = jax.sharding.get_abstract_mesh()
    (batch, *_, heads, _), kv_heads = spec("batch", None, "heads", None), spec("kv_heads")[0]
    ways = math.prod(mesh.shape[axis] for axis in batch)
    if q.shape[0] % ways:  # a generation batch smaller than the mesh
        batch = None
    if k.shape[2] % mesh.shape[kv_heads]:
        heads = kv_heads = None
    if partitions and (batch is None or heads is None):
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
