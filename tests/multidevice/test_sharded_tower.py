"""The vision tower with most switches, on a mesh of three axes: the same features, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.models.vision_config import EVA02
from mmjax.models.vit import ViT
from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import batch_sharding, parameter_shardings

IMAGES = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype(np.float32)
SMALL = dict(
    d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_mlp=24, num_layers=2, image_size=6,
    patch_size=2,
)  # fmt: skip


def run(config, shape):
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values()) or [1]))])
    with use(mesh):
        make = lambda: ViT(config, rngs=nnx.Rngs(0))  # noqa: E731
        graphdef, abstract = nnx.split(nnx.eval_shape(make))
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda leaf, to: jax.device_put(
                0.3 * rng.normal(size=leaf.shape).astype(np.float32), to
            ),
            abstract,
            parameter_shardings(abstract, mesh),
        )

        def loss(params, images):
            out = nnx.merge(graphdef, params)(images)
            return jnp.sin(out).sum(), out

        images = jax.device_put(IMAGES, batch_sharding(mesh))
        grads, out = jax.jit(jax.grad(loss, has_aux=True))(params, images)
        return np.asarray(out), jax.device_get(paths.flatten(grads))


def test_a_tower_does_not_depend_on_the_mesh():
    config = dataclasses.replace(EVA02, **SMALL)
    (one, wanted), (many, grads) = (
        run(config, shape) for shape in ({}, {"data": 2, "fsdp": 2, "tensor": 2})
    )
    np.testing.assert_allclose(many, one, atol=2e-5)
    for name, value in wanted.items():
        limit = 2e-5 * max(np.abs(value).max(), 1.0)
        np.testing.assert_allclose(grads[name], value, atol=limit, err_msg=name)
