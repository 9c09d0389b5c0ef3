"""Chunked cross-entropy against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.ops import xent


def test_chunks_change_neither_loss_nor_gradients():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (21, 8))
    kernel = jax.random.normal(keys[1], (8, 50))
    targets = jax.random.randint(keys[2], (21,), 0, 50)
    weights = (jax.random.uniform(keys[3], (21,)) > 0.3).astype(jnp.float32)

    def loss(hidden, kernel, chunk):
        return xent.chunked_nll(lambda x: x @ kernel, hidden, targets, weights, chunk=chunk)

    log_p = jax.nn.log_softmax(hidden @ kernel)
    dense = -jnp.sum(jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0] * weights)
    grad = jax.value_and_grad(loss, (0, 1))
    for chunk in (4, 8, 64):
        value, grads = grad(hidden, kernel, chunk)
        np.testing.assert_allclose(value, dense, rtol=1e-6)
        for ours, whole in zip(grads, grad(hidden, kernel, 64)[1], strict=True):
            np.testing.assert_allclose(ours, whole, atol=1e-5)


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

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * v * 4 / 4
