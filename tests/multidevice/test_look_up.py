"""Tokens looked up on a mesh: the same numbers, and no table that travels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from mmjax.nn.embed import Embed
from mmjax.nn.linear import DTypes
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import spec

B, T, D, V = 8, 6, 16, 48
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 4, "context": 2},
        # As many rows as the batch cannot be cut into: an answer's.
        {"data": 1, "fsdp": 8, "rows": 1},
    ],
)
def test_columns_travel_and_the_table_does_not(shape):
    shape = dict(shape)
    b = shape.pop("rows", B)
    rng = np.random.default_rng(0)
    tokens = rng.integers(V, size=(b, T)).astype(np.int32)
    weights = rng.normal(size=(b, T, D)).astype(np.float32)

    def make():
        return Embed(V, D, dtypes=DTypes(), init_std=1.0, rngs=nnx.Rngs(0))

    graphdef = nnx.graphdef(nnx.eval_shape(make))

    def loss(params, tokens, weights):
        found = nnx.merge(graphdef, params)(tokens)
        return jnp.sum(found * weights), found

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    params = nnx.state(make())
    (_, want), grads = run(params, tokens, weights)
    mesh = make_mesh(shape, jax.devices()[:8])
    with use(mesh):
        shardings = nnx.get_named_sharding(nnx.state(nnx.eval_shape(make)), mesh)
        params = jax.device_put(params, shardings)
        axes = ("batch", "length") if b == B else ()
        tokens, weights = (
            jax.device_put(a, NamedSharding(mesh, spec(*axes))) for a in (tokens, weights)
        )
        compiled = run.lower(params, tokens, weights).compile()
        (_, got), found = compiled(params, tokens, weights)
    np.testing.assert_array_equal(jax.device_get(got), want)
    (a,), (b,) = jax.tree.leaves(found), jax.tree.leaves(grads)
    np.testing.assert_allclose(jax.device_get(a), b, atol=1e-6)
    moved = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", compiled.as_text())
    sizes = [tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", "".join(moved))]
    assert sizes, "nothing travels"
    rows = V // shape.get("tensor", 1)
    assert not [s for s in sizes if rows in s and D in s], sizes
