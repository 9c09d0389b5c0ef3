"""The train step on meshes: the same loss and gradients, one compile, sharded parameters."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.nn import paths
from mmjax.nn.dropout import drop
from mmjax.nn.linear import DTypes, LoRA
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import batch_sharding
from mmjax.train import optim, state, step
from mmjax.train.loss import LossOptions
from mmjax.train.rows import Rows
from mmjax.train.step import BadStepSettings
from mmjax.types import MMJaxError
from tests import tiny

SETTINGS = optim.OptimSettings(lr=1e-2, warmup=0, schedule="constant")
SKIP = BadStepSettings("skip", max_loss=50.0)


def build(
    mesh, *, config=tiny.CONFIG, lora=None, freeze=(), accumulate=1, tx=None, schedule=None,
    param="float32", **options,
):  # fmt: skip
    def make():
        return tiny.Fuyu(config, rngs=nnx.Rngs(0), lora=lora, dtypes=DTypes(param=param))

    names = list(paths.flatten(nnx.state(nnx.eval_shape(make))))
    chosen = state.trainable_names(names, freeze, lora is not None)
    tx = tx or optim.make_optimizer(SETTINGS, 100)
    graphdef, train, frozen = state.init(make, chosen, tx, mesh)
    rate = schedule or optim.schedule(SETTINGS, 100)
    fn = step.make_train_step(graphdef, tx, rate, accumulate=accumulate, **options)
    return step.compile_step(fn, train), train, frozen


def run(shape, steps=3, **kwargs):
    count = int(np.prod(list(shape.values()) or [1]))
    mesh = make_mesh(shape, jax.devices()[:count])
    with use(mesh):
        fn, train, frozen = build(mesh, **kwargs)
        losses = []
        for i in range(steps):
            data = jax.device_put(tiny.batch(seed=i), batch_sharding(mesh))
            train, metrics = fn(train, frozen, data)
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(paths.flatten(train.params)), fn, train


# sgd(1): the parameters after one step differ by the gradients themselves.
GRADIENTS = {"tx": optax.sgd(1.0), "steps": 1}


DROPPING = dataclasses.replace(
    tiny.CONFIG,
    decoder=dataclasses.replace(
        tiny.CONFIG.decoder, residual_dropout=0.2, embedding_dropout=0.1
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 8}, marks=pytest.mark.heavy)],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(shape):
    """Nor do the masks of dropout."""
    one_loss, one, _, _ = run({}, config=DROPPING, **GRADIENTS)
    assert abs(one_loss[0] - run({}, **GRADIENTS)[0][0]) > 1e-3
    many_loss, many, fn, train = run(shape, config=DROPPING, **GRADIENTS)
    np.testing.assert_allclose(many_loss, one_loss, rtol=1e-5)
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, atol=2e-5, err_msg=name)
    assert fn._cache_size() == 1
    kernel = paths.flatten(train.params)["decoder.layers.mlp.up.kernel"]
    tensor = shape.get("tensor")
    expected = (2, 32 // shape["fsdp"], 64 // (tensor or 1))
    assert kernel.sharding.shard_shape(kernel.shape) == expected


def test_the_step_compiles_once():
    losses, _, fn, _ = run({"data": 2, "fsdp": 2, "tensor": 2}, steps=4)
    assert fn._cache_size() == 1
    assert len(set(losses)) == 4


def test_accumulation_averages_over_tokens_not_over_microbatches():
    _, whole, _, _ = run({}, **GRADIENTS)
    _, cut, _, _ = run({}, accumulate=4, **GRADIENTS)
    for name, value in whole.items():
        np.testing.assert_allclose(cut[name], value, atol=2e-6, err_msg=name)


@pytest.mark.heavy
def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    norms = []
    with use(make_mesh({}, jax.devices()[:1])) as mesh:
        for accumulate in (1, 4):
            options = dict(accumulate=accumulate, tx=optax.sgd(1.0), param="bfloat16")
            fn, train, frozen = build(mesh, **options)
            text = fn.lower(train, frozen, tiny.batch()).as_text()
            # XLA for several GPUs would hold two microbatches at once if it could count them.
            hidden = re.search(r"optimization_barrier %\S+ : tensor<i32>", text) is not None
            assert hidden == (accumulate > 1)
            train, metrics = fn(train, frozen, tiny.batch())
            norms.append(metrics["grad_norm"])
    assert norms[0].dtype == np.float32
    assert {str(x.dtype) for x in jax.tree.leaves(train.params)} == {"bfloat16"}
    np.testing.assert_allclose(*norms, rtol=1e-3)


@pytest.mark.heavy
def test_a_bad_step_is_told_and_moves_nothing_when_it_is_skipped():
    with use(make_mesh({}, jax.devices()[:1])) as mesh:
        fn, train, frozen = build(mesh, bad_steps=SKIP)
        nan = np.full_like(tiny.batch()["patches"], np.nan, np.float32)
        good, bad = tiny.batch(), tiny.batch() | {"patches": nan}
        train, metrics = fn(train, frozen, bad | {"patches": good["patches"]})
        assert not metrics["bad"] and int(train.step) == 1
        before = jax.device_get(train)
        train, metrics = fn(train, frozen, bad)
        assert metrics["bad"] and np.isnan(metrics["loss"]) and int(train.step) == 2
        for old, new in zip(*(moved(t) for t in (before, train)), strict=True):
            np.testing.assert_array_equal(old, new)
        train, metrics = fn(train, frozen, good)
        assert not metrics["bad"] and np.isfinite(metrics["loss"])
        np.testing.assert_allclose(metrics["padding"], 0.0)
        kernel = "decoder.layers.mlp.up.kernel"
        assert np.any(paths.flatten(train.params)[kernel] != paths.flatten(before.params)[kernel])
        strict, train, frozen = build(mesh, bad_steps=BadStepSettings(max_loss=1.0))
        assert strict(train, frozen, good)[1]["bad"]  # exploded: above max_loss


class Dropped(nnx.Module):
    """A model of ones that are dropped, so that a loss tells of its mask alone."""

    config = SimpleNamespace(vocab_size=4)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.head = nnx.Param(jnp.asarray(rng.normal(size=(32, 4)), jnp.float32))

    def __call__(self, batch, at):
        return drop(jnp.ones((*at.shape, 32)), 0.5, "ones")

    def logits(self, hidden):
        return hidden @ self.head[...]


def test_masks_are_drawn_anew_for_each_seed_step_and_microbatch():
    graphdef, params = nnx.split(Dropped())
    one = np.ones((2, 2), np.int32)  # two rows alike, each a microbatch and a source of its own
    batch = dict(tokens=one, segment_ids=one, target_index=one[:, :1])
    batch["target_source"] = np.int32([[0], [1]])
    tx, found = optax.sgd(0.0), {}
    for seed in (0, 1):
        fn = step.make_train_step(
            graphdef, tx, lambda n: n + 0.5, loss=LossOptions(2), accumulate=2, seed=seed,
            rates={"head": 0.1},
        )  # fmt: skip
        fn = jax.jit(fn)
        for number in (0, 1, 0):
            train = state.TrainState(jnp.int32(number), params, tx.init(params))
            metrics = fn(train, nnx.State({}), batch)[1]
            losses = metrics["source_loss"].tolist()
            assert (
                metrics["target_tokens"] == 2 and found.setdefault((seed, number), losses) == losses
            )
    losses = list(itertools.chain(*found.values()))
    assert len(losses) == len(set(losses)) == 8
    # Without a target nothing is lost, nothing is bad and nothing is divided by none.
    batch["target_index"], batch["segment_ids"] = -one[:, :1], np.int32([[1, 0], [0, 0]])
    train = state.TrainState(jnp.int32(3), params, tx.init(params))
    after, metrics = jax.device_get(fn(train, nnx.State({}), batch))
    for name in ("loss", "grad_norm", "target_tokens", "bad", "source_loss", "source_targets"):
        assert not np.any(metrics[name]), name
    assert (metrics["tokens"], metrics["padding"], after.step) == (1, 0.75, 4)
    np.testing.assert_allclose([metrics["lr"], metrics["lr/head"]], [3.5, 0.35])


def test_a_step_moves_the_trained_rows_alone_and_tells_the_norm_of_their_gradient():
    """Decay would move the others; the norm is of what training has, not of what it does."""
    graphdef, params = nnx.split(Dropped())
    one, tx = np.ones((2, 2), np.int32), optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5))
    batch = dict(tokens=one, segment_ids=one, target_index=one[:, :1])
    options = dict(rows={"head": Rows(1, (1, 3))}, loss=LossOptions(chunk=1))
    fn = jax.jit(step.make_train_step(graphdef, tx, lambda _: 0.5, **options))
    train = state.TrainState(jnp.int32(0), params, tx.init(params))
    text = fn.lower(train, nnx.State({}), batch).as_text()
    assert "optimization_barrier" in text  # one target after the other, again on the way back
    after, metrics = fn(train, nnx.State({}), batch)
    old, new = (np.asarray(t.params["head"][...]) for t in (train, after))
    assert np.flatnonzero(np.any(old != new, axis=0)).tolist() == [1, 3]
    grads = ((old - new) / 0.5 - 0.1 * old)[:, [1, 3]]
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((grads**2).sum()), rtol=1e-5)


def test_microbatches_have_rows_of_every_device_and_the_state_is_written_in_place():
    graphdef, params = nnx.split(Dropped())
    one, tx = np.ones((4, 2), np.int32), optax.sgd(1.0)
    with use(make_mesh({"data": 2}, jax.devices()[:2])) as mesh:
        batch = dict(tokens=one, segment_ids=one, target_index=one[:, :1])
        batch = jax.device_put(batch, batch_sharding(mesh))
        train = state.TrainState(jnp.int32(0), params, tx.init(params))
        train = jax.device_put(train, NamedSharding(mesh, PartitionSpec()))
        fn = step.make_train_step(graphdef, tx, lambda _: 0.5, accumulate=2)
        fn = step.compile_step(fn, train)
        text = fn.lower(train, nnx.State({}), batch).compile().as_text()
    assert "input_output_alias" in text and "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)  # no row travels


class Steep(Dropped):
    """A model whose loss is a number and whose gradient is none: a root at 0."""

    def logits(self, hidden):
        return hidden @ jnp.sqrt(0 * self.head[...])


def test_a_gradient_that_is_no_number_makes_a_bad_step_of_a_good_loss():
    graphdef, params = nnx.split(Steep())
    one, tx = np.ones((1, 2), np.int32), optax.sgd(1.0)
    batch = dict(tokens=one, segment_ids=one, target_index=one[:, :1])
    fn = jax.jit(step.make_train_step(graphdef, tx, lambda _: 1.0, bad_steps=SKIP))
    train = state.TrainState(jnp.int32(0), params, tx.init(params))
    after, metrics = fn(train, nnx.State({}), batch)
    np.testing.assert_allclose(metrics["loss"], np.log(4), rtol=1e-6)
    assert metrics["bad"] and not np.isfinite(metrics["grad_norm"])
    for old, new in zip(*(jax.tree.leaves(t.params) for t in (train, after)), strict=True):
        np.testing.assert_array_equal(old, new)


def moved(train):
    """All that a step moves but the count of the schedule, which goes on."""
    opt = jax.tree.map(
        lambda x: None if isinstance(x, optax.ScaleByScheduleState) else x,
        train.opt, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
    )  # fmt: skip
    return jax.tree.leaves((train.params, opt))


@pytest.mark.heavy
def test_the_learning_rate_that_is_logged_is_applied_after_a_skipped_step_too():
    """Lion moves every number by the learning rate, up or down."""
    linear = dataclasses.replace(
        SETTINGS, name="lion", schedule="linear", weight_decay=0.0, clip_norm=0.0
    )
    with use(make_mesh({}, jax.devices()[:1])) as mesh:
        fn, train, frozen = build(
            mesh, bad_steps=SKIP, tx=optim.make_optimizer(linear, 10),
            schedule=optim.schedule(linear, 10),
        )  # fmt: skip
        bad = tiny.batch()
        bad["patches"] = np.full_like(bad["patches"], np.nan, np.float32)
        train, _ = fn(train, frozen, bad)
        before = paths.flatten(jax.device_get(train.params))
        train, metrics = fn(train, frozen, bad | {"patches": tiny.batch()["patches"]})
        name = "decoder.layers.mlp.up.kernel"
        step = np.abs(np.asarray(paths.flatten(train.params)[name]) - before[name]).max()
    np.testing.assert_allclose(metrics["lr"], linear.lr * 0.9, rtol=1e-6)
    np.testing.assert_allclose(step, metrics["lr"], rtol=1e-4)


def test_lora_trains_adapters_alone():
    lora = LoRA(2, 4.0, ("attn.q", "mlp.up"))
    _, after, _, train = run({}, lora=lora)
    kinds = {name.rsplit(".", 1)[-1] for name in after}
    assert kinds == {"lora_a", "lora_b"}
    assert all(np.any(v) for n, v in after.items() if n.endswith("lora_b"))
    moments = [x for x in jax.tree.leaves(train.opt) if getattr(x, "ndim", 0) > 0]
    assert len(moments) == 2 * len(after)


def test_freeze_by_pattern_and_its_errors():
    _, after, _, _ = run({}, freeze=("decoder.embed.*", "*.bias"))
    assert "decoder.embed.embedding" not in after
    assert not any(name.endswith(".bias") for name in after)
    with pytest.raises(MMJaxError, match="vision.*matches no parameter"):
        run({}, freeze=("vision.*",))
    with pytest.raises(MMJaxError, match="nothing is left"):
        run({}, freeze=("*",))


def test_decay_acts_on_kernels_alone():
    settings = dataclasses.replace(SETTINGS, weight_decay=0.5, lr=0.1)
    names = ["decoder.layers.mlp.up.kernel", "decoder.embed.embedding", "patch_embed.bias"]
    assert [optim.decays(n) for n in names] == [True, False, False]
    tx = optim.make_optimizer(settings, 10)
    params = {"a": {"kernel": np.ones(3, np.float32)}, "b": {"scale": np.ones(3, np.float32)}}
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["b"]["scale"], 0)


def test_meshes_that_do_not_fit_are_explained():
    with pytest.raises(MMJaxError, match="needs 3 devices and there are 8"):
        make_mesh({"fsdp": 3})
    with pytest.raises(MMJaxError, match="'model' is unknown"):
        make_mesh({"model": 8})
    assert dict(make_mesh({"fsdp": -1, "tensor": 2}).shape)["fsdp"] == 4
