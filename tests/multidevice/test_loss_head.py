"""The head and its loss on a mesh: the same numbers, and no logits that travel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.ops import xent
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import spec

ROWS, D, V = 192, 16, 512


@pytest.mark.parametrize("chunk", [16, 1024])
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "context": 2}])
def test_the_kernel_travels_and_the_logits_do_not(shape, chunk):
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=s).astype(np.float32) for s in ((ROWS, D), (D, V)))
    targets = rng.integers(V, size=ROWS).astype(np.int32)
    weights = (rng.random(ROWS) > 0.3).astype(np.float32)

    def loss(hidden, kernel, targets, weights):
        return xent.chunked_nll(lambda x: x @ kernel, hidden, targets, weights, chunk=chunk)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    args = hidden, kernel, targets, weights
    want, grads = run(*(jnp.asarray(a) for a in args))
    mesh = make_mesh(shape, jax.devices()[:8])
    axes = (spec("batch"), P("fsdp", "tensor"), spec("batch"), spec("batch"))
    with use(mesh):
        args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, axes, strict=True)]
        got, found = run(*args)
        text = run.lower(*args).compile().as_text()
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(found, grads, strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, atol=1e-5)
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    travels = re.findall(rf"= \w+\[([0-9,]*)\]\S* (?:{kinds})\(", text)
    sizes = [[int(n) for n in t.split(",") if n] for t in travels]
    wide = [s for s in sizes if V in s or V // 4 in s]
    assert wide and all(sorted(s)[0] == D for s in wide), wide
