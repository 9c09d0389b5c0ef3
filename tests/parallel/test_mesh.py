"""Meshes by their axes, and the one table from logical axes to mesh axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmjax.nn import paths
from mmjax.parallel import sharding
from mmjax.parallel.mesh import check_batch, make_mesh, use
from mmjax.parallel.sharding import (
    RULES,
    batch_sharding,
    check_divides,
    constrain,
    divides,
    parameter_shardings,
    process_rows,
    put_batch,
    row_owners,
    shards,
    spec,
)
from mmjax.train.lengths import check_lengths
from mmjax.train.settings import DataSettings
from mmjax.types import MMJaxError
from tests import tiny


def sizes(*args, **kwargs):
    return tuple(dict(make_mesh(*args, **kwargs).shape).values())


def test_axes_are_filled_in_and_one_takes_what_is_left():
    assert sizes() == (1, 8, 1, 1)
    assert sizes({"fsdp": -1, "tensor": 2}) == (1, 4, 2, 1)
    assert sizes({"data": 2, "fsdp": 2, "tensor": 2}) == (2, 2, 2, 1)
    assert sizes({}, jax.devices()[:1]) == (1, 1, 1, 1)
    assert sizes({"data": -1}, jax.devices()[:3]) == (3, 1, 1, 1)


@pytest.mark.parametrize(
    "shape, says",
    [
        ({"fsdp": 3}, "needs 3 devices and there are 8"),
        ({"fsdp": -1, "tensor": 3}, "needs 3 x n devices and there are 8"),
        ({"fsdp": -1, "data": -1}, "at most one axis -1"),
        ({"fsdp": 0}, "mesh axis fsdp is 0; give 1 or more devices, or -1"),
        ({"data": 0, "fsdp": -1}, "mesh axis data is 0"),
        ({"data": -2, "fsdp": -4}, "mesh axis data is -2"),
        ({"model": 8}, "'model' is unknown; the axes are data, fsdp, tensor, context"),
    ],
)
def test_a_mesh_that_cannot_be_is_explained(shape, says):
    with pytest.raises(MMJaxError, match=says):
        make_mesh(shape)
    with pytest.raises(MMJaxError, match="at most one axis -1"):
        make_mesh({"fsdp": -1, "data": -1}, jax.devices()[:1])


def test_activations_are_cut_by_batch_and_not_by_their_width():
    assert spec("batch", "length", "embed") == P(("data", "fsdp"), "context", None)
    assert spec("batch", None, "heads", "head_dim") == P(("data", "fsdp"), None, "tensor", None)
    with pytest.raises(KeyError, match="'width' is unknown"):
        spec("width")


def test_constrain_pins_on_a_mesh_and_does_nothing_on_one_device():
    x = np.zeros((8, 4, 16), np.float32)
    with use(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})) as mesh:
        got = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(x)
        assert got.sharding.shard_shape(got.shape) == (2, 4, 8)
        rows = jax.device_put(np.zeros((8, 5)), batch_sharding(mesh))
        assert rows.sharding.shard_shape(rows.shape) == (2, 5)
    x = jnp.asarray(x)
    assert constrain(x, "batch", "length", "mlp") is x


def test_every_parameter_has_a_sharding_and_large_ones_are_cut():
    with use(make_mesh({"fsdp": 4, "tensor": 2})) as mesh:
        abstract = nnx.state(nnx.eval_shape(lambda: tiny.Fuyu(tiny.CONFIG, rngs=nnx.Rngs(0))))
        found = paths.flatten(parameter_shardings(abstract, mesh))
        shapes = {n: x.shape for n, x in paths.flatten(abstract).items()}
    assert found.keys() == shapes.keys()
    for name, shape in shapes.items():
        local = found[name].shard_shape(shape)
        cut = np.prod(shape) // np.prod(local)
        # patch_embed has no axis for tensor; biases and norms follow tensor or nothing.
        least = 1 if not name.endswith(("kernel", "embedding")) else 4 if "patch" in name else 8
        assert cut >= least, f"{name}: {shape} -> {local}"
    assert {axis for axis, _ in RULES} >= {"batch", "embed", "layers"}


@pytest.mark.parametrize(
    "rows, length, accumulate, says",
    [
        (
            6,
            8,
            1,
            "data.batch_size 6 does not divide into accumulate 1 x data 1 x fsdp 4; choose a",
        ),
        (8, 8, 4, "accumulate 4 x data 1 x fsdp 4; choose a multiple of 16"),
        (
            8,
            9,
            1,
            "data.seq_len 9 does not divide over context 2; choose a multiple of 2, such as 10",
        ),
    ],
)
def test_a_batch_that_does_not_divide_is_explained(rows, length, accumulate, says):
    mesh = make_mesh({"fsdp": 4, "context": 2})
    check_batch(mesh, 16, 8, 4)
    with pytest.raises(MMJaxError, match="6 does not .* data 2 x fsdp 2; choose a multiple of 4"):
        check_batch(make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4]), 6, 8)
    with pytest.raises(MMJaxError) as error:
        check_batch(mesh, rows, length, accumulate)
    assert says in str(error.value)
    with pytest.raises(MMJaxError, match="data.lengths 33 does not divide over context 2"):
        check_lengths(DataSettings(batch_size=8, seq_len=64, lengths=(33,)), mesh)


@pytest.mark.parametrize(
    "shape, says",
    [
        (
            {"tensor": 8},
            "its axis 1 of 4 does not divide over tensor 8; set mesh.tensor to a divisor",
        ),
        (
            {"fsdp": 6},
            "its axis 1 of 32 does not divide over fsdp 6; set mesh.fsdp to a divisor of 32",
        ),
    ],
)
def test_parameters_that_do_not_divide_are_named(shape, says):
    with use(make_mesh(shape, jax.devices()[: shape.get("fsdp", 8)])) as mesh:
        abstract = nnx.state(nnx.eval_shape(lambda: tiny.Fuyu(tiny.CONFIG, rngs=nnx.Rngs(0))))
        cuts = paths.flatten(parameter_shardings(abstract, mesh))
    leaves = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cuts[name])
        for name, x in paths.flatten(abstract).items()
    }
    with pytest.raises(MMJaxError) as error:
        check_divides(leaves)
    assert says in str(error.value)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device of another process, which no single process has."""

    id: int
    process_index: int
    client = None
    platform = device_kind = "cpu"


@pytest.mark.parametrize(
    "shape, owners",
    [
        ((4, 1, 1, 2), [3, 3, 2, 2, 1, 1, 0, 0]),  # each has rows of its own
        ((2, 1, 1, 4), [2, 2, 2, 2, 0, 0, 0, 0]),  # two share theirs
        ((1, 1, 8, 1), [0] * 8),
    ],
)
def test_of_processes_that_share_rows_the_first_owns_them(shape, owners):
    devices = np.array([Device(i, i // 2) for i in range(8)])
    for order, want in ((devices[::-1], owners), (devices, owners[::-1])):
        mesh = jax.sharding.Mesh(order.reshape(shape), ("data", "fsdp", "tensor", "context"))
        assert row_owners(mesh, 8) == want


def test_a_batch_is_put_where_the_mesh_wants_it():
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
    assert process_rows(mesh, 8) == list(range(8))
    batch = tiny.batch()
    put = put_batch(batch, mesh, 8)
    shapes = {name: x.sharding.shard_shape(x.shape) for name, x in put.items()}
    long = ("tokens", "positions", "visual_index", "segment_ids")
    assert {shapes[name] for name in long} == {(2, 8)}
    assert shapes["patches"] == (2, 3, 48) and shapes["target_index"] == (2, 4)
    for name, value in put.items():
        np.testing.assert_array_equal(value, batch[name])


def test_rows_of_one_process_among_several_are_cut_where_they_lie(monkeypatch):
    monkeypatch.setattr(sharding, "process_rows", lambda *_: [2, 3, 6, 7])
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, how, cut: (shape, how.spec, cut)
    )
    mesh, value = make_mesh({"data": 2, "fsdp": 2, "context": 2}), np.arange(24).reshape(4, 6)
    put = put_batch({"tokens": value, "patches": value}, mesh, 8)
    shape, axes, cut = put["tokens"]
    assert shape == (8, 6) and axes == P(("data", "fsdp"), "context")
    assert put["patches"][1] == P(("data", "fsdp"))
    np.testing.assert_array_equal(cut((slice(2, 4), slice(3, 6))), value[:2, 3:])
    got = cut((slice(6, None), slice(None)))
    np.testing.assert_array_equal(got, value[2:])
    assert np.shares_memory(got, value)


def test_what_a_mesh_does_not_divide_stays_whole():
    assert shards("targets", 12) == 1 and divides("embed", 7)
    with use(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert [shards("targets", n) for n in (12, 10)] == [4, 1]
        assert [shards(axis, 8) for axis in ("heads", "embed", "columns")] == [2, 1, 2]
        assert [divides("embed", n) for n in (8, 7)] == [True, False]
        assert divides("layers", 3) and not divides("heads", 3)
        got = jax.jit(lambda x: constrain(x, "batch", "mlp"))(np.zeros((6, 4)))
        assert got.sharding.shard_shape(got.shape) == (6, 2)
