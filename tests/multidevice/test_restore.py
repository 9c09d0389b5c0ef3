"""A checkpoint of one mesh goes on upon another: the same parameters, the same next loss."""

import grain
import jax
import numpy as np
import pytest
from flax import nnx
from test_step import build

from mmjax.checkpoint import CheckpointManager, CheckpointSettings
from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import batch_sharding
from mmjax.train import optim, state
from tests import tiny


def numbers():
    return iter(grain.MapDataset.range(10).to_iter_dataset())


def opened(workdir):
    return CheckpointManager(workdir, CheckpointSettings(), about={"name": "test"})


def next_loss(fn, train, frozen, mesh):
    data = jax.device_put(tiny.batch(seed=1), batch_sharding(mesh))
    return float(fn(train, frozen, data)[1]["loss"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with step 1 of a run on fsdp 8; its parameters, and the loss of its next step."""
    workdir = tmp_path_factory.mktemp("saved")
    with use(make_mesh({"fsdp": 8})) as mesh:
        fn, train, frozen = build(mesh)
        train, _ = fn(train, frozen, jax.device_put(tiny.batch(), batch_sharding(mesh)))
        checkpoints = opened(workdir)
        checkpoints.save(1, train, numbers(), {}, {"bad_steps": 3})
        checkpoints.close()
        parameters = jax.device_get(paths.flatten(train.params))
        return workdir, parameters, next_loss(fn, train, frozen, mesh)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="1"),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, id="2x2x2", marks=pytest.mark.heavy),
    ],
)
def test_another_mesh_goes_on_with_the_same_loss(saved, shape):
    workdir, parameters, loss = saved
    devices = jax.devices()[: int(np.prod(list(shape.values()) or [1]))]
    with use(make_mesh(shape, devices)) as mesh:
        fn, fresh, frozen = build(mesh)

        def make():
            return tiny.Fuyu(tiny.CONFIG, rngs=nnx.Rngs(0))

        tx = optim.make_optimizer(optim.OptimSettings(), 100)
        abstract = state.abstract_state(make, set(paths.flatten(fresh.params)), tx, mesh)[1]
        checkpoints = opened(workdir)
        train = checkpoints.restore(abstract, numbers())
        checkpoints.close()
        assert checkpoints.notes == {"bad_steps": 3}
        for name, value in paths.flatten(train.params).items():
            np.testing.assert_array_equal(value, parameters[name], err_msg=name)
            assert len(value.sharding.device_set) == mesh.size
        np.testing.assert_allclose(next_loss(fn, train, frozen, mesh), loss, rtol=1e-5)
