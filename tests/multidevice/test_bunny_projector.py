"""Connectors that see a grid, on a mesh of three axes: the same tokens and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models.bunny.projector import Projector, ProjectorConfig
from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import batch_sharding, parameter_shardings

FEATURES = np.random.default_rng(0).normal(size=(8, 16, 8)).astype(np.float32)


def run(kind, shape):
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values()) or [1]))])
    with use(mesh):
        config = ProjectorConfig(kind, 8, 16)
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Projector(config, rngs=nnx.Rngs(0))))
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda leaf, to: jax.device_put(rng.normal(size=leaf.shape).astype(np.float32), to),
            abstract,
            parameter_shardings(abstract, mesh),
        )

        def loss(params, features):
            out = nnx.merge(graphdef, params)(features)
            return jnp.square(out).sum(), out  # of terms that do not cancel

        features = jax.device_put(FEATURES, batch_sharding(mesh))
        grads, out = jax.jit(jax.grad(loss, has_aux=True))(params, features)
        return np.asarray(out), jax.device_get(paths.flatten(grads))


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["ldp", "sppv1"])
def test_a_connector_does_not_depend_on_the_mesh(kind):
    (one, wanted), (many, grads) = (
        run(kind, shape) for shape in ({}, {"data": 2, "fsdp": 2, "tensor": 2})
    )
    np.testing.assert_allclose(many, one, atol=2e-5)
    for name, value in wanted.items():
        limit = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(grads[name], value, atol=limit, err_msg=name)
