"""Context parallelism: a row cut over devices gives the loss and gradients of a whole one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.nn import paths
from mmjax.ops import ranges
from mmjax.ops.attention import attention
from mmjax.parallel.context import take_on_length
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import batch_sharding, constrain, put_batch
from mmjax.train.loss import loss_sum
from tests import tiny

ALL_AXES = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
B, T = 4, 48


def packed(t=T, targets=8):
    """Rows of three samples, and padding; pictures and targets lie across the cut at t / 2."""
    batch = tiny.batch(b=B, t=t, p=20, targets=targets)
    ends = np.array([t // 4, t // 2 + 5, t - 3])
    batch["segment_ids"][:] = (1 + (np.arange(t)[:, None] >= ends).sum(1)) % 4
    starts = np.array([0, *ends])[(np.arange(t)[:, None] >= ends).sum(1)]
    batch["positions"][:] = np.arange(t) - starts
    batch["visual_index"][:] = -1
    batch["visual_index"][:, t // 2 - 6 : t // 2 - 1] = np.arange(5)[::-1]
    batch["target_index"][:, :3] = (t // 4 - 1, t // 2, t // 2 + 1)  # t / 2: hidden on shard 0
    return batch


def on(shape):
    """A mesh of the first devices, as many as the shape has."""
    return make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values()) or [1]))])


def loss_and_gradients(shape, batch):
    with use(on(shape)) as mesh:
        graphdef, params = nnx.split(tiny.model())
        grad = jax.jit(jax.value_and_grad(lambda p, b: loss_sum(nnx.merge(graphdef, p), b)[0]))
        loss, grads = grad(params, put_batch(batch, mesh, B))
        return float(loss), jax.device_get(paths.flatten(grads))


@pytest.fixture(scope="module")
def whole():
    with use():
        return loss_and_gradients({}, packed())


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"context": 2}, marks=pytest.mark.heavy, id="context"),
        pytest.param(ALL_AXES, id="all_axes"),
    ],
)
def test_loss_and_gradients_equal_those_of_one_device(shape, whole):
    loss, grads = loss_and_gradients(shape, packed())
    np.testing.assert_allclose(loss, whole[0], rtol=1e-5)
    for name, value in whole[1].items():
        np.testing.assert_allclose(
            grads[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name
        )


@pytest.mark.parametrize(
    "causal, masked, sloped", [(True, True, False), (True, False, True), (False, False, False)]
)
def test_attention_of_a_share_of_the_queries(causal, masked, sloped):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 24, 4, 8))
    k, v = (jax.random.normal(key, (2, 24, 2, 8)) for key in keys[1:3])
    weight = jax.random.normal(keys[3], q.shape)
    start, end = ranges.from_segments(jnp.asarray(np.repeat([[1, 2, 3, 0]], 2, 0).repeat(6, 1)))
    more = dict(k_start=start, k_end=end) if masked else {}
    if sloped:
        more["alibi_slopes"] = jnp.array([0.5, 0.25, 0.125, 0.0625])

    def value(q, k, v):
        return jnp.sum(attention(q, k, v, causal=causal, **more) * weight)

    grad = jax.value_and_grad(value, (0, 1, 2))
    one = jax.jit(grad)(q, k, v)
    with use(on({"tensor": 2, "context": 4})):
        many = jax.jit(lambda *a: grad(*a))(*jax.device_get((q, k, v)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), many, one)


def test_entries_are_taken_from_whatever_share_they_stand_on():
    x = np.random.default_rng(0).normal(size=(4, 12, 3)).astype(np.float32)
    index = np.array([[0, 5, 6, 11]] * 4, np.int32)
    with use(on(ALL_AXES)):
        got = jax.jit(take_on_length)(x, index)
        flat = jax.jit(take_on_length)(x[..., 0], index)
    np.testing.assert_array_equal(got, np.take_along_axis(x, index[..., None], 1))
    np.testing.assert_array_equal(flat, np.take_along_axis(x[..., 0], index, 1))


def test_a_length_that_context_does_not_divide_stays_whole():
    q, k, v = (
        jax.random.normal(key, (4, 5, 4, 8)) for key in jax.random.split(jax.random.key(0), 3)
    )
    one = jax.jit(attention)(q, k, v)
    with use(on({"context": 2})):
        many = jax.jit(lambda *a: constrain(attention(*a), "batch", "length"))(
            *jax.device_get((q, k, v))
        )
    np.testing.assert_allclose(jax.device_get(many), one, rtol=1e-5, atol=1e-5)


def compiled(shape, t):
    """The compiled forward and backward pass on a mesh, nothing allocated."""
    with use(on(shape)) as mesh:
        graphdef, params = nnx.split(nnx.eval_shape(tiny.model))
        batch = packed(t)
        batch = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, k))
            for k, x in batch.items()
        }
        grad = jax.jit(jax.grad(lambda p, b: loss_sum(nnx.merge(graphdef, p), b)[0]))
        return grad.lower(params, batch).compile()


@pytest.mark.heavy
def test_no_device_holds_an_activation_of_the_full_length(monkeypatch):
    monkeypatch.setattr("mmjax.models.decoder.TRIM_LIMIT", 0)  # which a cut length never does
    t, c = 592, tiny.CONFIG.decoder
    one, two = compiled({}, t), compiled({"context": 2}, t)
    shapes = re.findall(r"(?:f|bf)\d+\[([0-9,]+)\]", two.as_text())
    shapes = {tuple(map(int, shape.split(","))) for shape in shapes}
    long = {shape for shape in shapes if t in shape or B * t in shape}
    # What has the full length is keys and values by heads, and blocks of scores; nothing d wide.
    assert long and all(c.d_model not in s and c.d_mlp not in s for s in long), long
    assert any(t // 2 in shape and c.d_mlp in shape for shape in shapes)
    one, two = (p.memory_analysis().temp_size_in_bytes for p in (one, two))
    assert two < 0.7 * one, (two, one)
