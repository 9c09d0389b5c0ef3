"""Learning rates of their own: torch's parameter groups, every optimizer, and what a run tells."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from rich.console import Console

from mmjax.config import fill
from mmjax.monitor.terminal import startup_table
from mmjax.schema import to_dataclass
from mmjax.train import startup
from mmjax.train.optim import (
    OptimSettings,
    RateSettings,
    by_rate,
    make_optimizer,
    schedule,
    shares,
)
from mmjax.train.plan import make_plan
from mmjax.train.settings import ModelSettings, RunSettings
from mmjax.types import MMJaxError

RATES = (RateSettings("projector.*", 2e-3),)
STEPS = 5


def start():
    rng = np.random.default_rng(0)
    names = ("projector.up.kernel", "projector.up.bias", "decoder.layers.attn.q.lora_a")
    return {name: rng.normal(size=(3, 2)).astype(np.float32) for name in names}


def gradients():
    rng = np.random.default_rng(1)
    return [
        {n: rng.normal(size=x.shape).astype(np.float32) for n, x in start().items()}
        for _ in range(STEPS)
    ]


def test_groups_move_as_torchs_adamw_moves_them():
    settings = OptimSettings(
        lr=2e-2, rates=RATES, warmup=2, weight_decay=0.5, decay=("*",), clip_norm=0.0, b1=0.8,
        b2=0.95, eps=1e-2,
    )  # fmt: skip
    tx, rate = make_optimizer(settings, STEPS), schedule(settings, STEPS)
    params = {name: jnp.asarray(x) for name, x in start().items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start().items()}
    own = [theirs[name] for name in theirs if name.startswith("projector.")]
    rest = [theirs[name] for name in theirs if not name.startswith("projector.")]
    peer = torch.optim.AdamW(
        [{"params": rest}, {"params": own, "lr": 2e-3}], lr=2e-2, weight_decay=0.5,
        betas=(0.8, 0.95), eps=1e-2,
    )  # fmt: skip
    # A warm-up of two steps, then half a cosine over the other three.
    shape = [0.5, 1.0, *(0.5 * (1 + np.cos(np.pi * i / 3)) for i in range(3))]
    along = torch.optim.lr_scheduler.LambdaLR(peer, lambda step: shape[min(step, 4)])
    state = tx.init(params)
    for step, gradient in enumerate(gradients()):
        told = [float(rate(step)), float(rate(step)) * shares(settings)["projector.*"]]
        np.testing.assert_allclose(told, [g["lr"] for g in peer.param_groups], rtol=1e-5)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        peer.step()
        along.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(params[name], parameter.detach(), atol=1e-6, err_msg=name)
    assert np.abs(params["projector.up.kernel"] - start()["projector.up.kernel"]).max() > 1e-3


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_every_optimizer_scales_the_whole_update(name):
    plain = OptimSettings(name=name, lr=2e-2, warmup=0, weight_decay=0.5)
    first = RateSettings("*.bias", 1e-2)
    moved = []
    for settings in (plain, dataclasses.replace(plain, rates=(first, *RATES))):
        tx = make_optimizer(settings, STEPS)
        moved.append(tx.update(gradients()[0], tx.init(start()), start())[0])
    ratio = {key: np.asarray(moved[1][key] / moved[0][key]) for key in start()}
    np.testing.assert_allclose(ratio["projector.up.bias"], 0.5, rtol=1e-5)  # the first that matches
    np.testing.assert_allclose(ratio["projector.up.kernel"], 0.1, rtol=1e-5)
    np.testing.assert_array_equal(ratio["decoder.layers.attn.q.lora_a"], 1.0)


def test_a_run_with_rates_goes_on_from_a_checkpoint_without():
    plain, own = OptimSettings(), OptimSettings(rates=RATES)
    states = [make_optimizer(one, STEPS).init(start()) for one in (plain, own)]
    paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(s)] for s in states]
    assert paths[0] == paths[1]


def test_a_recipe_sets_them_and_the_table_tells_them():
    recipe = fill(RunSettings, dict(optim=dict(lr=2e-2, rates=(dict(params="a.*", lr=2e-3),))))
    settings = to_dataclass(RunSettings, recipe).optim
    assert settings.rates == (RateSettings("a.*", 2e-3),)
    params = {"a": {"kernel": jnp.zeros((30, 40))}, "b": {"kernel": jnp.zeros(2)}}
    own = by_rate(settings, ["a.kernel", "b.kernel"])
    assert own == {"a.*": ["a.kernel"]}
    lines = startup.rate_lines(own, settings, params)
    assert lines == {"learning rate": "0.02, 0.002 for a.* (1,200 parameters)"}
    assert startup.rate_lines({}, OptimSettings(), params) == {}
    shown = io.StringIO()
    Console(file=shown, width=100).print(startup_table({}, [], lines))
    assert "0.002 for a.* (1,200 parameters)" in shown.getvalue()


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            OptimSettings(rates=(RateSettings("projecter.*", 1e-3),)),
            r"'projecter\.\*' matches no trained parameter.*did you mean 'projector\.up",
        ),
        (OptimSettings(rates=RATES * 2), r"'projector\.\*' is left with no parameter"),
        (
            OptimSettings(rates=(RateSettings("*", 1e-3), *RATES)),
            r"'projector\.\*' is left with no parameter: patterns before it match them all",
        ),
        (
            OptimSettings(rates=(RateSettings("projector.*", -1e-3),)),
            r"'projector\.\*' the rate -0\.001",
        ),
        (OptimSettings(lr=0.0, rates=RATES), r"beside optim\.lr 0\.0"),
    ],
)
def test_rates_that_cannot_work_are_refused(settings, message):
    with pytest.raises(MMJaxError, match=message):
        by_rate(settings, list(start()))


def test_a_plan_refuses_what_a_run_refuses():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=4)
    run = RunSettings(
        model=ModelSettings(config=sizes, words=("what",)), optim=OptimSettings(rates=RATES)
    )
    with pytest.raises(MMJaxError, match=r"'projector\.\*' matches no trained parameter"):
        make_plan(run, jax.devices()[:1])
