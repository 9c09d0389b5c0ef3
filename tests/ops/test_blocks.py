"""Bounds of blocks against a look at every pair of a query and a key."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.ops import blocks
from tests.ops.reference import masks

KINDS = ["causal", "full", "packed", "padded", "window", "media", "random"]


def pairs(kind, b, t, s, bq, bk):
    """Return start, end and bool[b, query blocks, key blocks]: which blocks meet, which are full.

    A pair of blocks is full when every query that sees any key sees all keys of the block.
    """
    start, end, causal = masks(kind, b, t, s)
    start, end = np.clip(start, 0, s), np.clip(end, 0, s)
    end = np.minimum(end, np.arange(t) + 1) if causal else end
    nq, nk = -(-t // bq), -(-s // bk)
    j = np.arange(nk * bk)
    seen = np.zeros((b, nq * bq, nk * bk), bool)
    seen[:, :t] = (j >= start[:, :, None]) & (j < end[:, :, None])
    counts = seen.any(-1).reshape(b, nq, bq)
    seen = seen.reshape(b, nq, bq, nk, bk)
    meets = seen.any((2, 4))
    full = (seen.all(4) | ~counts[..., None]).all(2) & meets
    return jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32), meets, full


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t, s, bq, bk", [(70, 70, 16, 8), (53, 41, 8, 16), (5, 30, 16, 16)])
def test_bounds_cover_what_is_seen_and_full_blocks_need_no_mask(kind, t, s, bq, bk):
    start, end, meets, full = pairs(kind, 3, t, s, bq, bk)
    cut = blocks.cut(start, end, s, bq, bk)
    sides = [
        (blocks.key_bounds(*cut), meets, full),
        (blocks.query_bounds(*cut, meets.shape[2]), meets.swapaxes(1, 2), full.swapaxes(1, 2)),
    ]
    for bounds, meets, full in sides:
        at = np.arange(meets.shape[2])
        lo, full_lo, full_hi, hi = (np.asarray(bounds)[..., i, None] for i in range(4))
        assert (lo <= full_lo).all() and (full_lo <= full_hi).all() and (full_hi <= hi).all()
        walked, unmasked = (at >= lo) & (at < hi), (at >= full_lo) & (at < full_hi)
        assert not (meets & ~walked).any()
        assert not (unmasked & meets & ~full).any()
        if kind != "random":  # nothing in vain
            some = meets.any(-1)
            first, last = meets.argmax(-1), meets.shape[2] - meets[..., ::-1].argmax(-1)
            assert (lo[..., 0][some] == first[some]).all()
            assert (hi[..., 0][some] == last[some]).all()
            assert not (walked & ~some[..., None]).any()


def test_a_causal_triangle_masks_its_diagonal_only():
    zero, t = jnp.zeros((1, 64), jnp.int32), 64
    cut = blocks.cut(zero, zero + jnp.arange(1, t + 1), t, 16, 16)
    assert blocks.key_bounds(*cut)[0].tolist() == [[0, 0, i, i + 1] for i in range(4)]
    assert blocks.query_bounds(*cut, 4)[0].tolist() == [[j, j + 1, 4, 4] for j in range(4)]


def test_padding_at_the_end_of_packed_rows_costs_nothing():
    start = jnp.asarray([[0] * 16 + [16] * 16 + [0] * 32], jnp.int32)
    end = jnp.asarray([[16] * 16 + [32] * 16 + [0] * 32], jnp.int32)
    cut = blocks.cut(start, end, 64, 16, 16)
    walked = blocks.key_bounds(*cut)[0]
    assert (walked[:, 3] - walked[:, 0]).tolist() == [1, 1, 0, 0]
    assert (walked[:, 2] - walked[:, 1]).tolist() == [1, 1, 0, 0]
    walked = blocks.query_bounds(*cut, 4)[0]
    assert (walked[:, 3] - walked[:, 0]).tolist() == [1, 1, 0, 0]
    assert (walked[:, 2] - walked[:, 1]).tolist() == [1, 1, 0, 0]
