"""Range attention for Hopper GPUs: Pallas kernels lowered through Mosaic GPU.

Three kernels: forward here, dq, and dk with dv, in ``flash_mosaic_backward``. Each walks over the
blocks that ``mmjax.ops.blocks`` names, those without a mask in a loop of their own. Matmuls are
wgmma, loads and stores TMA, and one warpgroup of a program does nothing but load (FlashAttention-3,
Shah et al. 2024). Off a GPU JAX interprets them, warpgroups and barriers included, for tests.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmjax.ops import blocks, implementations
from mmjax.ops import mosaic_parts as parts
from mmjax.ops.flash_mosaic_backward import backward
from mmjax.ops.kernel_rule import bounds_of, differentiable, interpreted

MIN_JAX = (0, 11)
"""Before it Pallas has no public interpreter of Mosaic, and other names for what is used here."""
CAPABILITY = 9
"""Of Hopper, the only GPUs with wgmma."""
MISCOMPILING = range(12080, 12091)
"""Versions of CUDA with which JAX's own kernel of this kind refuses causal masks, for ptxas."""
DTYPES = ("bfloat16", "float16")


def flash_attention(
    q, k, v, ranges, alibi_slopes, *, causal: bool, scale: float, interpret: bool | None = None
) -> Array:
    """Compute range attention; the contract is that of ``mmjax.ops.attention.attention``.

    scale is a Python number. interpret: run the kernels in JAX's interpreter, where float32 runs
    too; None does so off a GPU. A length that is no multiple of 8 costs padded copies of its
    arrays.
    """
    t, (start, end) = q.shape[1], bounds_of(q, k, ranges, causal)
    q, k, v, start, end = (_whole_tiles(x) for x in (q, k, v, start, end))
    out = _flash(q, k, v, start, end, alibi_slopes, float(scale), interpreted(interpret))
    return out[:, :t]


def problem(call: implementations.Call) -> str | None:
    """Tell what keeps the kernels from a call; None if nothing does."""
    if jax.__version_info__ < MIN_JAX:
        least, has = ".".join(map(str, MIN_JAX)), jax.__version__
        return f"it needs jax {least} or newer, thus Python 3.12, and this is jax {has}"
    found = implementations.capability()
    if jax.default_backend() == "gpu" and (found is None or int(found) != CAPABILITY):
        has = "another vendor's" if found is None else f"of compute capability {found}"
        return f"it needs a Hopper GPU, of compute capability {CAPABILITY}.0, and this one is {has}"
    if cuda_version() in MISCOMPILING:
        return f"CUDA {cuda_version()} may compile its masks wrongly; CUDA 13 does not"
    mesh = jax.sharding.get_abstract_mesh()
    if jax.default_backend() != "gpu" and not mesh.empty and mesh.size > 1:
        return f"off a GPU it runs on one device, and the mesh has {mesh.size}"
    if call.q.shape[3] not in parts.TILES:
        return f"head dim {call.q.shape[3]} is none of {', '.join(map(str, parts.TILES))}"
    return call.dtype_problem(DTYPES)


def cuda_version() -> int | None:
    """Return the version of CUDA that JAX's backend is of, 13000 for 13.0; None without CUDA."""
    found = re.search(r"cuda (\d+)", jax.local_devices()[0].client.platform_version)
    return int(found[1]) if found else None


def _whole_tiles(x):
    """Pad the length to whole tiles of TMA, with queries that see nothing and keys unseen."""
    more = -x.shape[1] % parts.TILE_ROWS
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x


def _forward(q, k, v, start, end, slopes, scale, interpret):
    """Return the output and the log-sum-exp, float32[b, n, t], natural logarithm."""
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    tile = parts.TILES[h].forward
    bounds = blocks.key_bounds(*blocks.cut(start, end, s, tile.program, tile.walk))
    start, end = parts.padded(tile.program, start, end, values=(0, 0))
    inputs = dict(bounds=bounds, start=start, end=end, slopes=slopes, q=q, k=k, v=v)
    outputs = dict(
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        lse=jax.ShapeDtypeStruct((b, n, start.shape[1]), jnp.float32),
    )
    heads = ((h,), q.dtype)
    scratch = dict(
        own=parts.own(tile, q=heads, start=((), jnp.int32), end=((), jnp.int32)),
        sums=plgpu.SMEM((tile.warpgroups, tile.own), jnp.float32),
        keys=parts.ring(tile, heads),
        values=parts.ring(tile, heads),
        staging=parts.staging(tile, q.dtype, interpret),
    )
    kernel = functools.partial(_forward_kernel, tile=tile, groups=n // kv, scale=scale)
    grid = (b, n, pl.cdiv(t, tile.program))
    out, lse = parts.call(kernel, "flash_forward", grid, tile, interpret, inputs, outputs, scratch)
    return out, lse[:, :, :t]


_flash = differentiable(_forward, backward)


def _forward_kernel(x, own, sums, keys, values, staging, *, tile, groups, scale):
    row, head, block, bounds = parts.program(x.bounds, last_first=True)

    def load():
        kv_head = lax.div(head, jnp.int32(groups))
        parts.load_keys(tile, row, kv_head, bounds, x.k, x.v, keys, values)

    def compute(warpgroup):
        i0 = block * tile.program + warpgroup * tile.own
        at = pl.ds(i0, tile.own)
        sources = dict(q=x.q.at[row, at, head], start=x.start.at[row, at], end=x.end.at[row, at])
        mine = parts.load_own(own, warpgroup, **sources)
        start, end = (plgpu.load(ref, layout=parts.vector(0)) for ref in (mine.start, mine.end))
        slope = None if x.slopes is None else x.slopes[head]
        stage = None if staging is None else staging.at[warpgroup]
        (k_slots,), (v_slots,) = keys.slots, values.slots

        def step(j, carry, masked):
            acc, m, total = carry
            slot = parts.slot_of(tile, j - bounds[0])
            plgpu.barrier_wait(keys.loaded.at[slot])
            raw = parts.product(mine.q, k_slots.at[slot].T)
            plgpu.barrier_arrive(keys.freed.at[slot])
            score = raw * (scale * parts.LOG2E)
            ranges = (start, end) if masked else None
            score = parts.masked(score, i0, j * tile.walk, slope, ranges, 0)
            if masked or slope is not None or scale < 0:
                top = score.max(1)
            else:  # the factor is then applied within p alone, where it costs nothing (an FMA)
                top = raw.max(1) * (scale * parts.LOG2E)
            m_new = jnp.maximum(m, top)
            finite = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            p = jnp.exp2(score - parts.over(finite, score.shape, 0))
            keep = jnp.exp2(m - finite)
            total = total * keep + p.sum(1)
            p = parts.left(p.astype(v_slots.dtype), stage)
            plgpu.barrier_wait(values.loaded.at[slot])
            new = parts.product(p, v_slots.at[slot])
            plgpu.barrier_arrive(values.freed.at[slot])
            return acc * parts.over(keep, acc.shape, 0) + new, m_new, total

        m = plgpu.layout_cast(jnp.full((tile.own,), -jnp.inf, jnp.float32), parts.vector(0))
        total = plgpu.layout_cast(jnp.zeros((tile.own,), jnp.float32), parts.vector(0))
        acc = plgpu.layout_cast(jnp.zeros(mine.q.shape, jnp.float32), plgpu.Layout.WGMMA)
        acc, m, total = parts.loops(bounds, step, (acc, m, total))
        # A query without keys took part in the blocks that need no mask: its sums mean nothing.
        empty = (start >= end) | (total == 0.0)
        safe = jnp.where(empty, 1.0, total)
        out = acc * parts.over(jnp.where(empty, 0.0, 1.0 / safe), acc.shape, 0)
        # +inf for an empty row: exp(score - inf) is 0 in the backward pass, without a case.
        lse = jnp.where(empty, jnp.inf, m / parts.LOG2E + jnp.log(safe))
        parts.store(
            (out, mine.q, x.out.at[row, at, head]),
            (lse, sums.at[warpgroup], x.lse.at[row, head, at]),
        )

    parts.share(tile, load, compute)
