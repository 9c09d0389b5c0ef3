"""Chunked cross-entropy against the dense one."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.ops import xent
from tests import compiler_options


def test_chunks_change_neither_loss_nor_gradients():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (21, 8))
    kernel = jax.random.normal(keys[1], (8, 50))
    targets = jax.random.randint(keys[2], (21,), 0, 50)
    weights = (jax.random.uniform(keys[3], (21,)) > 0.3).astype(jnp.float32)

    def loss(hidden, kernel, chunk):
        return xent.chunked_nll(lambda x: x @ kernel, hidden, targets, weights, chunk=chunk)

    h, k = (np.asarray(a, np.float64) for a in (hidden, kernel))
    logits = h @ k
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    dense = -np.sum(np.log(p[np.arange(21), targets]) * weights)
    d = (p - np.eye(50)[targets]) * np.asarray(weights)[:, None]
    grad = jax.value_and_grad(loss, (0, 1))
    for chunk in (4, 8, 64):
        value, grads = grad(hidden, kernel, chunk)
        np.testing.assert_allclose(value, dense, rtol=1e-6)
        for ours, whole in zip(grads, (d @ k.T, h.T @ d), strict=True):
            np.testing.assert_allclose(ours, whole, atol=1e-5)


def test_a_chunk_of_a_small_vocabulary_has_more_rows():
    """64 MiB of float32 logits, and never fewer than 1,024 rows; what is given is taken."""
    assert [xent.chunk_rows(v) for v in (512, 4096, 16_384, 262_144)] == [32_768, 4096, 1024, 1024]
    assert xent.chunk_rows(512, 16) == 16


def test_large_and_masked_logits_stay_finite():
    logits = jnp.array([[1e4, -jnp.inf, 0.0], [-1e4, -1e4, -jnp.inf]])
    loss, grads = jax.value_and_grad(lambda x: xent.nll(x, jnp.array([2, 0])).sum())(logits)
    assert float(loss) == 1e4 + np.float32(np.log(2))
    np.testing.assert_allclose(grads, [[1, 0, -1], [-0.5, 0.5, 0]], atol=1e-3)


def test_the_log_sum_exp_is_taken_once():
    """Chunks compute their logits again in the backward pass, and nothing else of the forward."""
    ones = jnp.ones(64)

    def loss(hidden, kernel):
        return xent.chunked_nll(lambda x: x @ kernel, hidden, ones.astype(int), ones, chunk=16)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    text = run.lower(jnp.ones((64, 8)), jnp.ones((8, 32))).compile().as_text()
    assert len(re.findall(r" log\(", text)) == 1
    assert len(re.findall(r" dot\(", text)) == 4  # logits, logits again, and two gradients


def test_several_sums_come_from_one_pass():
    keys = jax.random.split(jax.random.key(1), 4)
    hidden, kernel = jax.random.normal(keys[0], (21, 8)), jax.random.normal(keys[1], (8, 50))
    targets = jax.random.randint(keys[2], (21,), 0, 50)
    weights = jax.random.uniform(keys[3], (21, 3))
    for chunk in (4, 64):
        sums = [xent.chunked_nll(lambda x: x @ kernel, hidden, targets, w, chunk=chunk)
                for w in (weights, *weights.T)]  # fmt: skip
        np.testing.assert_allclose(sums[0], sums[1:], rtol=1e-6)


def test_the_logits_of_all_rows_never_exist():
    rows, d, v = 4096, 16, 8192
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, d), (d, v))]

    def loss(hidden, kernel):
        ones = jnp.ones(rows)
        return xent.chunked_nll(lambda x: x @ kernel, hidden, ones.astype(int), ones, chunk=256)

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes)
    compiled = lowered.compile(compiler_options=compiler_options.LIBRARY)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 256 * v * 4  # one chunk's
