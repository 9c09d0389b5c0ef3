"""The loss against a dense computation, and packed rows against samples alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.train.loss import loss_by_source, loss_sum
from tests import tiny


def dense(model, batch):
    """Log-softmax over every position's logits; the targets are picked at the end."""
    logits = np.asarray(model.logits(model(batch)), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = count = 0
    for row, targets in enumerate(batch["target_index"]):
        for t in targets[targets > 0]:
            total -= log_p[row, t - 1, batch["tokens"][row, t]]
            count += 1
    return total, count


@pytest.mark.parametrize("chunk", [3, 8, 1024])
def test_the_loss_is_that_of_all_logits_at_once(chunk):
    model, batch = tiny.model(), tiny.batch()
    total, count = jax.jit(loss_sum, static_argnames="chunk")(model, batch, chunk=chunk)
    want, number = dense(model, batch)
    assert int(count) == number == 28  # 8 rows of 4, every other one of 3
    np.testing.assert_allclose(total, want, rtol=1e-5)


def pack(examples, t, p, targets):
    """Lay samples behind one another in one row, by hand."""
    row = {k: np.zeros((1, t), np.int32) for k in ("tokens", "positions", "segment_ids")}
    row["visual_index"] = np.full((1, t), -1, np.int32)
    row["patches"] = np.zeros((1, p, 48), np.uint8)
    row["target_index"] = np.full((1, targets), -1, np.int32)
    at = patch = target = 0
    for number, (one, wanted) in enumerate(examples, 1):
        n, m = len(one["tokens"]), len(one["patches"])
        row["tokens"][0, at : at + n] = one["tokens"]
        row["positions"][0, at : at + n] = one["positions"]
        row["segment_ids"][0, at : at + n] = number
        visual = one["visual_index"]
        row["visual_index"][0, at : at + n] = np.where(visual >= 0, visual + patch, -1)
        row["patches"][0, patch : patch + m] = one["patches"]
        row["target_index"][0, target : target + len(wanted)] = np.asarray(wanted) + at
        at, patch, target = at + n, patch + m, target + len(wanted)
    return row


@pytest.fixture
def samples():
    rng = np.random.default_rng(5)
    shapes = ((9, 2, (4, 8)), (14, 5, (10, 11, 13)), (6, 0, (2, 3)))
    return [(tiny.example(rng, t, p), wanted) for t, p, wanted in shapes]


def test_packed_equals_the_sum_over_samples_alone(samples):
    model = tiny.model()
    loss = jax.jit(loss_sum)
    packed, count = loss(model, pack(samples, 32, 8, 10))
    assert int(count) == 7
    alone = [loss(model, pack([one], 32, 8, 10))[0] for one in samples]
    np.testing.assert_allclose(packed, sum(alone), rtol=1e-5)
    want = sum(dense(model, pack([one], 16, 8, 10))[0] for one in samples)
    np.testing.assert_allclose(packed, want, rtol=1e-5)


def test_the_loss_by_source_is_that_of_each_source_alone(samples):
    model, row = tiny.model(), pack(samples, 32, 8, 10)
    # Samples of 2, 3 and 2 targets, from sources 1, 0 and 1; source 2 gave none.
    row["target_source"] = np.array([[1, 1, 0, 0, 0, 1, 1, -1, -1, -1]], np.int32)
    loss = jax.jit(loss_sum)
    alone = [float(loss(model, pack([one], 32, 8, 10))[0]) for one in samples]
    totals, counts = loss_by_source(model, row, 3, chunk=4)
    np.testing.assert_allclose(totals, [alone[1], alone[0] + alone[2], 0], rtol=1e-5)
    assert counts.tolist() == [3, 4, 0]


def test_a_sample_does_not_see_its_neighbours(samples):
    model = tiny.model()
    first = model(pack(samples[:1], 32, 8, 10))[0, :9]
    together = model(pack(samples, 32, 8, 10))[0, :9]
    np.testing.assert_allclose(first, together, atol=1e-5)
    other = [(dict(samples[0][0]), samples[0][1]), *samples[1:]]
    other[0][0]["tokens"] = other[0][0]["tokens"][::-1].copy()
    second = slice(9, 9 + 14)
    np.testing.assert_allclose(
        model(pack(samples, 32, 8, 10))[0, second],
        model(pack(other, 32, 8, 10))[0, second],
        atol=1e-5,
    )


def test_padding_is_no_target_and_has_no_gradient(samples):
    model = tiny.model()
    row = pack(samples[:1], 16, 4, 6)
    longer = pack(samples[:1], 32, 8, 12)
    loss = jax.jit(loss_sum)
    np.testing.assert_allclose(loss(model, row)[0], loss(model, longer)[0], rtol=1e-5)
    nothing = row | {"target_index": np.int32([[-1, 0] * 3])}  # nothing foretells a first token
    run = jax.jit(jax.value_and_grad(loss_sum, has_aux=True))
    (total, count), grads = run(model, nothing)
    assert (float(total), float(count)) == (0.0, 0.0)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_only_supervised_rows_reach_the_gradient_of_the_patches(samples):
    model = tiny.model()
    rows = pack(samples, 32, 8, 10)
    patches = jnp.asarray(rows["patches"], jnp.float32) / 255
    grad = jax.jit(jax.grad(lambda p: loss_sum(model, rows | {"patches": p})[0]))(patches)
    used = np.any(np.asarray(grad[0]) != 0, axis=-1)
    assert used[:7].all() and not used[7:].any()  # 2 + 5 patches, the rest is padding
