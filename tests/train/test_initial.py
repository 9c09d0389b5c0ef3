"""What a run begins with, and what it goes on with: nothing that is trained is there twice."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from mmjax import checkpoint_steps
from mmjax.checkpoint import CheckpointManager, CheckpointSettings
from mmjax.models import converted, registry
from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train import build, evaluation, initial, loop
from mmjax.train.design import make_outline
from mmjax.train.settings import (
    DataSettings,
    LogSettings,
    LoRASettings,
    ModelSettings,
    RunSettings,
)
from mmjax.train.state import chosen_by

SIZES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=8
)
RANDOM = ModelSettings(config=SIZES, words=("what is it? red", "User: Assistant:"), dtype="float32")
DATA = DataSettings(
    sources={"train": {"kind": "magnifier", "split": "train", "image_size": 32}}, seq_len=64,
    max_patches=48, max_targets=8, batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder to begin from."""
    path = tmp_path_factory.mktemp("init")
    with use() as mesh:
        plan = build.blueprint(RANDOM, LoRASettings(), 7)
        outline = make_outline(RunSettings(model=RANDOM), plan.make, mesh)
        state, _ = initial.init_state(plan, RunSettings(model=RANDOM), outline, mesh)
        plan.processor.save_pretrained(path / "companions")
        params = {k: np.asarray(v) for k, v in paths.flatten(state.params).items()}
        converted.save_model(
            path / "model", params, family=registry.family("fuyu"), config=plan.config,
            folders=(path / "companions",),
        )  # fmt: skip
    return path / "model"


@pytest.mark.heavy
@pytest.mark.parametrize(
    "start, kind",
    [("random", "bfloat16"), ("folder", "int8")]
    + [
        pytest.param(*case, marks=pytest.mark.heavy)
        for case in (("random", "int8"), ("folder", "bfloat16"))
    ],
)
def test_the_frozen_part_alone_is_that_of_the_start(folder, start, kind):
    model = RANDOM if start == "random" else ModelSettings(init=str(folder), dtype="float32")
    model = dataclasses.replace(model, frozen_dtype=kind)
    run = RunSettings(model=model, lora=LoRASettings(rank=2), train=("patch_embed.*",))
    with use() as mesh:
        plan = build.blueprint(model, run.lora, 7, partial(chosen_by, run))
        outline = make_outline(run, plan.make, mesh)
        _, whole = initial.init_state(plan, run, outline, mesh)
        alone = initial.init_frozen(plan, run, outline, mesh)
    want, got = paths.flatten(whole), paths.flatten(alone)
    assert got.keys() == want.keys() and len(got) > 5
    for name, value in want.items():
        assert got[name].dtype == value.dtype and np.any(value) == np.any(got[name])
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.heavy
def test_going_on_and_answering_hold_what_is_trained_once(tmp_path, monkeypatch):
    """A state of parameters and two moments beside the one that is read may be too much."""
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))
    monkeypatch.setattr(evaluation, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))
    log = LogSettings(every=1, pictures=0, tensorboard=False)
    keep = CheckpointSettings(every=1, export=False)
    run = RunSettings(steps=1, model=RANDOM, data=DATA, log=log, checkpoint=keep)
    loop.run(run, tmp_path)
    there = []

    def counted(of, name):
        true = getattr(of, name)

        def call(*args, **kwargs):
            there.append(live_bytes())
            return true(*args, **kwargs)

        monkeypatch.setattr(of, name, call)

    counted(CheckpointManager, "restore")
    counted(checkpoint_steps, "load_params")
    before = live_bytes()
    with use() as mesh:
        plan = build.blueprint(RANDOM, run.lora, 0)
        state = make_outline(run, plan.make, mesh).state
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    loop.run(dataclasses.replace(run, steps=2), tmp_path)
    model, step = evaluation.open_model(tmp_path, run)
    assert step == 2 and len(there) == 2 and size > 50_000
    assert max(there) - before < size / 4
    assert live_bytes() - before < 1.25 * size  # of the model alone, without moments
    assert model.generate("what?", max_new_tokens=1) is not None


def live_bytes():
    """Bytes of all of JAX's arrays in this process."""
    return sum(x.nbytes for x in jax.live_arrays())
