"""Which blocks of keys a block of queries meets, and the other way round.

A kernel reads these as the bounds of its loops: blocks that no query sees are never loaded, and
blocks that all queries see whole need no mask. Both are computed from the ranges of the queries in
O(t + blocks), never from pairs of blocks.
"""

import jax.numpy as jnp
from jax import Array, lax


def cut(start: Array, end: Array, s: int, block_q: int, block_k: int) -> tuple[Array, ...]:
    """Return (lo, full_lo, full_hi, hi), int32[b, query blocks] each, counted in key blocks.

    start, end: int32[b, t], ranges within [0, s]. Some query of a block sees keys of the blocks
    [lo, hi); every query with keys sees all of the blocks [full_lo, full_hi), where that is not
    empty. Queries that see nothing do not count; a block of only such queries has lo >= hi.
    """
    b, t = start.shape
    pad = ((0, 0), (0, -t % block_q))
    start, end = jnp.pad(start, pad), jnp.pad(end, pad)
    whole = -(-s // block_k) * block_k
    blocks = lambda x, empty: jnp.where(start < end, x, empty).reshape(b, -1, block_q)  # noqa: E731
    lo, full_hi = (blocks(x, whole).min(-1) // block_k for x in (start, end))
    full_lo, hi = (-(-blocks(x, 0).max(-1) // block_k) for x in (start, end))
    return lo, full_lo, full_hi, hi


def key_bounds(lo: Array, full_lo: Array, full_hi: Array, hi: Array) -> Array:
    """Return int32[b, query blocks, 4]: first block, first and last full block, last block.

    Full blocks are those that need no mask; "last" is one past the last, as in a range.
    """
    lo = jnp.minimum(lo, hi)
    full_lo = jnp.clip(full_lo, lo, hi)
    return jnp.stack([lo, full_lo, jnp.clip(full_hi, full_lo, hi), hi], axis=-1)


def query_bounds(lo: Array, full_lo: Array, full_hi: Array, hi: Array, key_blocks: int) -> Array:
    """Return int32[b, key blocks, 4]: the same bounds for a block of keys, in query blocks.

    Exact where starts and ends never decrease from one query to the next (causal, packed, padded,
    windows, media); otherwise some blocks in between are met in vain, or masked in vain.
    """
    b, n = lo.shape
    i = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    row = jnp.arange(b)[:, None]
    met = lo < hi

    def smallest(at, reverse):
        """The least query block with ``at <= j``, or with ``at > j``; n if there is none."""
        least = jnp.full((b, key_blocks + 1), n, jnp.int32).at[row, at].min(jnp.where(met, i, n))
        least = lax.cummin(least, axis=1, reverse=reverse)
        return least[:, 1:] if reverse else least[:, :-1]

    def largest(at, reverse):
        """One past the greatest query block with ``at <= j``, or with ``at > j``; else 0."""
        most = jnp.zeros((b, key_blocks + 1), jnp.int32).at[row, at].max(jnp.where(met, i + 1, 0))
        most = lax.cummax(most, axis=1, reverse=reverse)
        return most[:, 1:] if reverse else most[:, :-1]

    # A query block meets key block j where lo <= j < hi: it is none before the first with either.
    last = jnp.minimum(largest(lo, False), largest(hi, True))
    first = jnp.minimum(jnp.maximum(smallest(lo, False), smallest(hi, True)), last)
    # j is full where full_lo <= j < full_hi: after all that end too early, before all that start
    # too late.
    full_first = jnp.clip(largest(full_hi, False), first, last)
    full_last = jnp.clip(smallest(full_lo, True), full_first, last)
    return jnp.stack([first, full_first, full_last, last], axis=-1)
