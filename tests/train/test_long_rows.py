"""A train step over long rows: what never exists in memory, and the FLOPs it costs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models.decoder import DecoderConfig
from mmjax.models.fuyu.model import Fuyu, FuyuConfig
from mmjax.models.work import forward_flops
from mmjax.nn import paths
from mmjax.parallel.mesh import use
from mmjax.train.loss import loss_sum
from mmjax.train.optim import OptimSettings, make_optimizer, schedule
from mmjax.train.state import abstract_state
from mmjax.train.step import compile_step, make_train_step


def config(**sizes):
    return FuyuConfig(decoder=DecoderConfig(**sizes), patch_size=8)


def shapes_of(t, patches, targets, dim):
    ints = {"tokens": t, "positions": t, "visual_index": t, "segment_ids": t}
    ints["target_index"] = targets
    batch = {k: jax.ShapeDtypeStruct((1, n), jnp.int32) for k, n in ints.items()}
    return batch | {"patches": jax.ShapeDtypeStruct((1, patches, dim), jnp.uint8)}


@pytest.mark.parametrize(
    "limit",
    [2**25, pytest.param(0, marks=pytest.mark.heavy)],
    ids=["last layer trimmed", "whole"],
)
def test_a_step_of_16k_tokens_has_no_square_and_no_logits(limit, monkeypatch):
    monkeypatch.setattr("mmjax.models.decoder.TRIM_LIMIT", limit)
    t, v, targets = 16_384, 8192, 4096
    c = config(
        vocab_size=v, d_model=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, d_mlp=128
    )
    settings = OptimSettings()
    tx, rate = make_optimizer(settings, 10), schedule(settings, 10)
    with use() as mesh:

        def make():
            return Fuyu(c, rngs=nnx.Rngs(0))

        names = set(paths.flatten(nnx.state(nnx.eval_shape(make))))
        graphdef, state, frozen = abstract_state(make, names, tx, mesh)
        step = compile_step(make_train_step(graphdef, tx, rate), state)
        batch = shapes_of(t, t // 2, targets, c.patch_dim)
        compiled = step.lower(state, frozen, batch).compile()
    found = re.findall(r"(?:f|bf|s|pred|u)\d*\[([0-9,]+)\]", compiled.as_text())
    sizes = {shape: int(np.prod([int(n) for n in shape.split(",")])) for shape in set(found)}
    square = {s for s, n in sizes.items() if n >= t * t // 8}
    logits = {s for s in sizes if {str(v)} & set(s.split(",")) and sizes[s] >= t * v // 4}
    assert not square and not logits
    # The scores of one head alone would be 1 GiB, the logits of all targets 128 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 400e6


def test_the_flops_of_a_step_are_those_the_model_states(monkeypatch):
    """Forward and backward within 5 %, one layer: the compiler counts a scan's body once."""
    monkeypatch.setattr("mmjax.models.decoder.TRIM_LIMIT", 0)
    monkeypatch.setattr("mmjax.ops.flash_xla.CPU_BLOCK_BYTES", 2**30)  # no loop over rows either
    t, targets = 1024, 256
    c = config(
        vocab_size=4096, d_model=512, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=64,
        d_mlp=2048,
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Fuyu(c, rngs=nnx.Rngs(0), remat="off")))
    batch = shapes_of(t, t, targets, c.patch_dim)

    def loss(params, batch):
        return loss_sum(nnx.merge(graphdef, params), batch)[0]

    forward = forward_flops(c.work(t, asked=targets / t, visual=t, width=c.patch_dim))
    for run, want in ((loss, forward), (jax.grad(loss), 3 * forward)):
        cost = jax.jit(run).lower(params, batch).compile().cost_analysis()
        np.testing.assert_allclose(cost["flops"], want, rtol=0.05)
