"""Schedules at the steps that matter, clipping and decay against torch's arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.train.optim import OptimSettings, decays, make_optimizer, schedule
from mmjax.types import MMJaxError


def values(steps=100, at=(), **kwargs):
    rate = schedule(OptimSettings(lr=1e-2, **kwargs), steps)
    return [float(rate(i)) for i in at]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_rises_from_the_first_step_to_the_peak(kind):
    got = values(schedule=kind, warmup=10, at=(0, 4, 9, 10))
    np.testing.assert_allclose(got, [1e-3, 5e-3, 1e-2, 1e-2], rtol=1e-5)


def test_each_schedule_ends_where_it_says():
    # 10 of warm-up leave 90: half-way is step 55.
    half = 1e-2 * 0.5 * (1 + math.cos(math.pi * 0.5))
    got = values(schedule="cosine", warmup=10, at=(55, 100))
    np.testing.assert_allclose(got, [half, 0], atol=1e-8)
    got = values(schedule="cosine", warmup=10, final_lr=0.2, at=(55, 100))
    np.testing.assert_allclose(got, [6e-3, 2e-3], rtol=1e-5)
    got = values(schedule="linear", warmup=10, final_lr=0.1, at=(55, 100))
    np.testing.assert_allclose(got, [5.5e-3, 1e-3], rtol=1e-5)
    assert values(schedule="constant", warmup=10, at=(55, 99)) == pytest.approx([1e-2, 1e-2])


def test_warm_up_may_be_a_share_or_nothing():
    assert values(warmup=0.05, at=(0, 4)) == pytest.approx([2e-3, 1e-2])
    assert values(warmup=0, schedule="linear", at=(0, 50)) == pytest.approx([1e-2, 5e-3])
    assert values(steps=10, warmup=10, at=(9,)) == pytest.approx([1e-2])


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(MMJaxError, match=r"optim\.warmup is 200 steps and the run has 100"):
        schedule(OptimSettings(warmup=200), 100)


def settings(**kwargs):
    plain = dict(lr=0.1, warmup=0, schedule="linear", weight_decay=0.0, clip_norm=0.0)
    return OptimSettings(**plain | kwargs)


def test_a_restored_optimizer_goes_on_along_the_schedule():
    tx = make_optimizer(settings(), 10)
    params = {"a": {"kernel": jnp.ones(2)}}
    gradient = {"a": {"kernel": jnp.array([1.0, -2.0])}}
    state, steps = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(gradient, state, params)
        steps.append(updates["a"]["kernel"])
    # With one gradient again and again Adam moves by exactly the learning rate.
    np.testing.assert_allclose([abs(s[0]) for s in steps], 0.1 - 0.01 * np.arange(6), rtol=1e-4)
    # What a checkpoint keeps: leaves by their path, put into a state made anew.
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    again = jax.tree.unflatten(jax.tree.structure(tx.init(params)), leaves)
    ours, _ = tx.update(gradient, again, params)
    theirs, _ = tx.update(gradient, state, params)
    np.testing.assert_array_equal(ours["a"]["kernel"], theirs["a"]["kernel"])


def test_clipping_bounds_the_norm_over_all_parameters():
    gradient = {"a": {"kernel": jnp.array([3.0, 0.0])}, "b": {"bias": jnp.array([4.0])}}
    for bound, scale in ((1.0, 1 / 5), (10.0, 1.0), (0.0, 1.0)):
        # Adam hides the scale of its gradients; its first moment does not: (1 - b1) * g.
        tx = make_optimizer(settings(clip_norm=bound), 10)
        _, state = tx.update(gradient, tx.init(gradient), gradient)
        mu = optax.tree.get(state, "mu")
        np.testing.assert_allclose(mu["a"]["kernel"], [0.1 * 3 * scale, 0], rtol=1e-5)
        np.testing.assert_allclose(mu["b"]["bias"], [0.1 * 4 * scale], rtol=1e-5)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("decoder.layers.attn.q.kernel", True),
        ("patch_embed.kernel", True),
        ("decoder.layers.mlp.up.lora_a", True),
        ("decoder.layers.mlp.up.bias", False),
        ("decoder.layers.attn_norm.scale", False),
        ("decoder.embed.embedding", False),
    ],
)
def test_decay_acts_on(name, expected):
    assert decays(name) is expected


def test_decay_is_decoupled_and_scaled_by_the_learning_rate():
    tx = make_optimizer(settings(weight_decay=0.5), 10)
    params = {"kernel": jnp.full(2, 3.0), "bias": jnp.full(2, 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
