"""A frozen base in int8: what is rounded, and that the rest trains beside it as it should."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.nn import int8, paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train import build, frozen, optim
from mmjax.train import state as train_state
from mmjax.train.loss import loss_sum
from mmjax.train.settings import LoRASettings, ModelSettings, RunSettings
from mmjax.types import MMJaxError
from tests import tiny

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=4
)
MODEL = ModelSettings(config=SIZES, words=("what",), dtype="float32", frozen_dtype="int8")
LORA = LoRASettings(rank=2, targets=("attn.*",))


def made(settings):
    """Return (graphdef, trained, frozen, plan) of a run that starts from random weights."""
    plan = build.blueprint(
        settings.model, settings.lora, 0, lambda names: train_state.chosen_by(settings, names)
    )
    chosen = train_state.chosen_by(settings, plan.names())
    tx = optim.make_optimizer(settings.optim, 10)
    graphdef, state, rest = build.init_state(
        plan, settings, chosen, tx, make_mesh({}, jax.devices()[:1])
    )
    return graphdef, state.params, rest, plan


def test_frozen_kernels_are_int8_and_adapters_train_beside_them():
    settings = RunSettings(model=MODEL, lora=LORA)
    with use(make_mesh({}, jax.devices()[:1])):
        graphdef, params, rest, plan = made(settings)
        kinds = {name: x.dtype.name for name, x in paths.flatten(rest).items()}
        kernels = {n for n in kinds if n.endswith(".kernel")}
        assert len(kernels) == 8 and {kinds[n] for n in kernels} == {"int8"}
        assert {kinds[f"{n}_scale"] for n in kernels} == {"float32"}
        others = {k for n, k in kinds.items() if not n.endswith((".kernel", ".kernel_scale"))}
        assert others == {"bfloat16"}
        assert all(n.endswith(("lora_a", "lora_b")) for n in paths.flatten(params))
        batch = tiny.batch(plan.config.vocab_size) if hasattr(tiny, "batch") else None
        # The numbers that the int8 kernels stand for, in a model without any.
        whole = int8.multiplied_out(nnx.state(nnx.merge(graphdef, params, rest)), "float32")
        exact = dataclasses.replace(
            settings, model=dataclasses.replace(MODEL, frozen_dtype="float32")
        )
        plain_def, plain_params, plain_rest, _ = made(exact)
        plain_rest = paths.replace(plain_rest, {n: whole[n] for n in paths.flatten(plain_rest)})
        plain_params = paths.replace(plain_params, paths.flatten(params))
        grads = [
            jax.grad(lambda p: loss_sum(nnx.merge(g, p, r), batch)[0])(p)  # noqa: B023
            for g, p, r in ((graphdef, params, rest), (plain_def, plain_params, plain_rest))
        ]
    for (name, ours), theirs in zip(
        paths.flatten(grads[0]).items(), paths.flatten(grads[1]).values(), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4, err_msg=name)


def test_trained_kernels_stay_whole():
    settings = RunSettings(model=MODEL, freeze=("decoder.layers.*",))
    with use(make_mesh({}, jax.devices()[:1])):
        _, params, rest, _ = made(settings)
    assert paths.flatten(params)["patch_embed.kernel"].dtype == np.float32
    assert paths.flatten(rest)["decoder.layers.attn.q.kernel"].dtype == np.int8


def test_where_every_kernel_is_trained_there_is_nothing_to_round():
    with pytest.raises(MMJaxError, match="every kernel is trained; set it to bfloat16"):
        frozen.int8_maps(["a.kernel", "b.bias"], {"a.kernel"})
