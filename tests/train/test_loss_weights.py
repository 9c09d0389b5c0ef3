"""Weights of sources in the loss: as two backward passes, one over each source's own targets."""

import functools

import jax
import numpy as np
import optax
import pytest

from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train import state, step
from mmjax.train.loss import LossOptions, source_weights
from mmjax.types import MMJaxError
from tests import tiny

CHOSEN = {"decoder.embed.embedding", "decoder.layers.mlp.up.kernel", "decoder.head.kernel"}
BATCH = tiny.batch()
SOURCES = np.where(BATCH["target_index"] > 0, np.arange(4) // 3, -1).astype(np.int32)
SOURCES[2:4] = np.where(SOURCES[2:4] >= 0, 2, -1)  # 15, 4 and 7 targets
WEIGHTS = (0.2, 1.0, 0.7)
WEIGHED = LossOptions(3, WEIGHTS)


@functools.cache
def made(shape, **options):
    """A jitted step of SGD of rate 1, which moves by the gradients, and what it begins with."""
    devices = jax.devices()[: int(np.prod([size for _, size in shape]))]
    mesh = make_mesh(dict(shape), devices)
    with use(mesh):
        graphdef, train, frozen = state.init(tiny.model, CHOSEN, optax.sgd(1.0), mesh)
        fn = step.make_train_step(graphdef, optax.sgd(1.0), lambda _: 1.0, **options)
        return mesh, jax.jit(fn), train, frozen


def gradient(batch, shape=(), **options):
    """Gradients of a step by name, and its metrics."""
    mesh, fn, train, frozen = made(shape, **options)
    with use(mesh):
        after, metrics = fn(train, frozen, batch)
        moved = jax.tree.map(lambda a, b: np.asarray(a - b), train.params, after.params)
    return paths.flatten(moved), jax.device_get(metrics)


@pytest.fixture(scope="module")
def alone():
    """(gradients, loss) of each source in a pass of its own, one mean over its own targets."""
    found = []
    for number in range(3):
        index = np.where(number == SOURCES, BATCH["target_index"], -1)
        grads, metrics = gradient(BATCH | {"target_index": index})
        found.append((grads, metrics["loss"]))
    return found


@pytest.mark.parametrize(
    "shape, accumulate",
    [((), 4), pytest.param((("data", 2), ("fsdp", 2)), 1, marks=pytest.mark.heavy)],
)
def test_the_loss_equals_a_backward_pass_for_each_source(alone, shape, accumulate):
    got, metrics = gradient(
        BATCH | {"target_source": SOURCES}, shape, accumulate=accumulate, loss=WEIGHED
    )
    pairs = list(zip(WEIGHTS, alone, strict=True))
    np.testing.assert_allclose(metrics["loss"], sum(w * x for w, (_, x) in pairs), rtol=1e-5)
    np.testing.assert_allclose(metrics["source_loss"], [x for _, x in alone], rtol=1e-5)
    for name, value in got.items():
        want = sum(w * grads[name] for w, (grads, _) in pairs)
        np.testing.assert_allclose(value, want, atol=3e-6, err_msg=name)
    norm = np.sqrt(sum((x**2).sum() for x in got.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_without_weights_it_is_one_mean_over_all_targets(alone):
    _, metrics = gradient(BATCH | {"target_source": SOURCES}, loss=LossOptions(3))
    counts = [(i == SOURCES).sum() for i in range(3)]
    assert metrics["source_targets"].tolist() == counts and sum(counts) == 28
    want = sum(n * x for n, (_, x) in zip(counts, alone, strict=True)) / 28
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


def test_a_source_without_a_target_in_the_batch_adds_nothing(alone):
    index = np.where(SOURCES == 1, BATCH["target_index"], -1)
    batch = BATCH | {"target_index": index, "target_source": np.where(SOURCES == 1, 1, -1)}
    got, metrics = gradient(batch, loss=WEIGHED, accumulate=4)
    np.testing.assert_allclose(metrics["loss"], WEIGHTS[1] * alone[1][1], rtol=1e-5)
    for name, value in got.items():
        np.testing.assert_allclose(value, WEIGHTS[1] * alone[1][0][name], atol=2e-6, err_msg=name)


def test_weights_are_those_of_the_sources_by_name():
    names = ("laion", "mmc4")
    assert source_weights(None, names) is None
    assert source_weights({"mmc4": 1, "laion": 0.2}, names) == (0.2, 1.0)
    assert source_weights({"mmc4": 1, "laion": 0}, names[::-1]) == (1.0, 0.0)


@pytest.mark.parametrize(
    "weights, says",
    [
        ({"laion": 1.0, "mcm4": 1.0}, "'mcm4', which is no source; did you mean 'mmc4'?"),
        ({"laion": 1.0}, "has none for mmc4"),
        ({"laion": -1.0, "mmc4": 1.0}, "from 0 up"),
        ({"laion": 0.0, "mmc4": 0.0}, "at least above 0"),
        ({"laion": float("nan"), "mmc4": 1.0}, "from 0 up"),
        ({"laion": float("inf"), "mmc4": 1.0}, "from 0 up"),
    ],
)
def test_weights_that_cannot_be_meant_are_named(weights, says):
    with pytest.raises(MMJaxError) as error:
        source_weights(weights, ("laion", "mmc4"))
    assert says in str(error.value)
