"""Quantised kernels: how far a weight moves, and models against the numbers they stand for."""

import jax
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.models.views import MultipliedOut
from mmjax.nn import int8, paths
from mmjax.nn.linear import DTypes, Linear
from mmjax.parallel.mesh import make_mesh, use
from mmjax.types import MMJaxError
from tests.parity import peer

IDS = [1, 20, 5, 5, 6, 5, 5, 6, 33, 41, 9]
PATCHES = np.random.default_rng(1).uniform(-1, 1, (4, 48)).astype(np.float32)


def test_no_weight_moves_by_more_than_half_a_step():
    kernel = np.random.default_rng(0).normal(size=(2, 5, 3, 4)).astype(np.float32)
    kernel[1, :, 2, 3] = 0
    q, scale = int8.quantize(kernel, (1,))
    assert q.dtype == np.int8 and scale.shape == (2, 3, 4) and scale[1, 2, 3] == 1
    np.testing.assert_allclose(scale[0], np.abs(kernel[0]).max(0) / 127, rtol=1e-6)
    assert np.abs(q).max() == 127
    moved = np.abs(np.asarray(q) * np.asarray(scale)[:, None] - kernel)
    assert (moved <= np.asarray(scale)[:, None] * 0.5001).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuyu")
    peer.tiny_fuyu().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "mesh", [None, pytest.param({"tensor": 2, "fsdp": 2}, marks=pytest.mark.heavy)]
)
def test_a_model_of_int8_kernels_is_the_one_their_numbers_stand_for(folder, mesh):
    mesh = mesh and make_mesh(mesh, jax.devices()[:4])
    model, exact = mmjax.load(folder, weights="int8", mesh=mesh), mmjax.load(folder)
    values = paths.flatten(nnx.state(model.model))
    scaled = {name for name in values if name.endswith(".kernel")}
    assert len(scaled) == 8  # q, k, v, o, up, down, head and the patches
    assert all(values[name].dtype == np.int8 for name in scaled)
    stand_for = {name: jax.device_get(x) for name, x in values.items()}
    for name in scaled:
        kernel, scale = stand_for[name], stand_for[f"{name}_scale"]
        stacked = ".layers." in name
        inputs = kernel.ndim - scale.ndim
        shape = (*scale.shape[:stacked], *[1] * inputs, *scale.shape[stacked:])
        stand_for[name] = kernel * scale.reshape(shape)
    nnx.update(exact.model, paths.replace(nnx.state(exact.model), stand_for))
    want = exact.logits(IDS, PATCHES)[1]
    np.testing.assert_allclose(model.logits(IDS, PATCHES)[1], want, atol=2e-5)
    answers = [m.generate(IDS, PATCHES, max_new_tokens=6) for m in (model, exact)]
    assert answers[0] == answers[1]


@pytest.mark.heavy
def test_a_model_of_nf4_kernels_is_the_one_their_numbers_stand_for(folder):
    mesh = make_mesh({"tensor": 2, "fsdp": 2}, jax.devices()[:4])
    model, exact = mmjax.load(folder, weights="nf4", mesh=mesh), mmjax.load(folder)
    state, before = nnx.state(model.model), paths.flatten(nnx.state(exact.model))
    codes = {name: x for name, x in paths.flatten(state).items() if name.endswith(".kernel")}
    assert len(codes) == 8
    for name, kernel in codes.items():
        assert kernel.dtype == np.uint8 and kernel.size * 2 == before[name].size
    # The inputs of down are cut by tensor, those of up by fsdp, as whole kernels are.
    cut = [codes[f"decoder.layers.mlp.{name}.kernel"].sharding.spec for name in ("up", "down")]
    assert [tuple(spec) for spec in cut] == [(None, "fsdp", "tensor"), (None, "tensor", "fsdp")]
    whole = MultipliedOut(state, "float32")
    stand_for = {name: whole.read(name) for name in whole.keys()}  # noqa: SIM118
    assert all(0 < np.abs(stand_for[name] - before[name]).max() < 0.2 for name in codes)
    nnx.update(exact.model, paths.replace(nnx.state(exact.model), stand_for))
    want = exact.logits(IDS, PATCHES)[1]
    np.testing.assert_allclose(model.logits(IDS, PATCHES)[1], want, atol=2e-5)


def test_other_weights_are_refused(folder):
    with pytest.raises(MMJaxError, match='weights is \'int4\'; give "int8" or "nf4", or None'):
        mmjax.load(folder, weights="int4")


def test_sums_of_steps_fit_where_the_compute_dtype_is_float16():
    """They are hundreds of times what they stand for, and float16 ends at 65,504."""
    rng = np.random.default_rng(0)
    dtypes = DTypes("float32", "float16", kernel="int8")
    about = dict(name="a", bias=False, dtypes=dtypes, init_std=0.02)
    with use():
        linear = Linear((256,), (8,), ("embed", "mlp"), rngs=nnx.Rngs(0), **about)
    x = rng.normal(size=(4, 256)).astype(np.float16) + np.float16(30)
    kernel = 0.02 + 0.01 * rng.random((256, 8)).astype(np.float32)
    steps, scale = int8.quantize(kernel, (0,))
    linear.kernel[...], linear.kernel_scale[...] = steps, scale
    want = np.float64(x) @ (np.float64(steps) * np.float64(scale))
    assert want.min() > 150 and want.max() < 250
    np.testing.assert_allclose(linear(x), want, rtol=2e-3)
