"""Targets by pattern, and runs whose adapters go on from an earlier one's."""

import dataclasses
import json
import shutil

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.checkpoint import CheckpointManager, CheckpointSettings
from mmjax.data import check
from mmjax.models import converted, opening, registry
from mmjax.nn import paths
from mmjax.nn.linear import LoRA
from mmjax.parallel.mesh import use
from mmjax.train import adapters, build, initial
from mmjax.train.design import make_outline
from mmjax.train.settings import DataSettings, LoRASettings, ModelSettings, RunSettings
from mmjax.types import MMJaxError

MAPS = ["attn.k", "attn.o", "attn.q", "attn.v", "head", "mlp.down", "mlp.up", "patch_embed"]
SIZES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=8
)
MODEL = ModelSettings(config=SIZES, words=("what is it? red", "User: Assistant:"))
ADAPTER = LoRASettings(rank=2, alpha=3.0, targets=("attn.q", "mlp.*"), rslora=True)


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (("*",), MAPS),
        (("attn.*",), MAPS[:4]),
        (("mlp.up", "head"), ["head", "mlp.up"]),
        (("attn.[qv]", "patch_*"), ["attn.q", "attn.v", "patch_embed"]),
        (LoRASettings().targets, [*MAPS[:4], "mlp.down", "mlp.up"]),
    ],
)
def test_targets_are_patterns(patterns, expected):
    assert adapters.make_lora(LoRASettings(rank=4, targets=patterns), MAPS) == LoRA(
        4, 16.0, tuple(expected)
    )


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(targets=("attn.*", "mpl.*")), ["'mpl.*' matches no linear map", *MAPS]),
        (dict(targets=()), ["matches no linear map", "attn.q"]),
        (dict(dropout=1.0), ["lora.dropout 1.0", "below 1"]),
        (dict(rank=-1), ["lora.rank is -1"]),
        (dict(alpha=0.0), ["lora.alpha 0.0"]),
        (dict(alpha=float("inf")), ["lora.alpha inf", "finite"]),
        (dict(rank=0, init="/runs/a"), ["/runs/a", "set lora.rank"]),
    ],
)
def test_settings_that_cannot_be_meant_are_named(settings, says):
    with pytest.raises(MMJaxError) as error:
        adapters.make_lora(LoRASettings(**{"rank": 4} | settings), MAPS)
    for part in says:
        assert part in str(error.value)


def begin(lora, model=MODEL):
    """The state a run begins with, and its parts."""
    settings = RunSettings(model=model, lora=lora)
    with use() as mesh:
        plan = build.blueprint(model, lora, 0)
        outline = make_outline(settings, plan.make, mesh)
        return plan, *initial.init_state(plan, settings, outline, mesh)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A workdir and a model folder of one run, whose adapters have moved to 0.5."""
    root = tmp_path_factory.mktemp("earlier")
    plan, train, frozen = begin(ADAPTER)
    moved = {name: jnp.full(x.shape, 0.5) for name, x in paths.flatten(train.params).items()}
    train = dataclasses.replace(train, params=paths.replace(train.params, moved))
    workdir = root / "workdir"
    workdir.mkdir()
    settings = dataclasses.asdict(RunSettings(model=MODEL, lora=ADAPTER))
    (workdir / "config.json").write_text(json.dumps(settings))
    saver = CheckpointManager(workdir, CheckpointSettings(), about={"name": "test"})
    saver.save(7, train, iter(grain.MapDataset.range(3).to_iter_dataset()), {})
    saver.close()
    plan.processor.save_pretrained(root / "processor")
    converted.save_model(
        root / "model", {**moved, **paths.flatten(frozen)}, family=registry.family("fuyu"),
        config=plan.config, lora=plan.lora, folders=(root / "processor",),
    )  # fmt: skip
    return root


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["workdir", "workdir/checkpoints/7", "model"])
def test_a_run_goes_on_from_an_earlier_runs_adapters(earlier, kind):
    """With one map more than that run had: it begins fresh."""
    lora = dataclasses.replace(
        ADAPTER, init=str(earlier / kind), targets=("attn.q", "attn.k", "mlp.*")
    )
    _, train, _ = begin(lora)
    for name, value in paths.flatten(train.params).items():
        if ".attn.k." in name:
            assert np.any(value) == name.endswith("lora_a"), name
        else:
            np.testing.assert_array_equal(value, np.full(value.shape, 0.5), err_msg=name)


def test_a_run_goes_on_from_a_model_folder_with_adapters(earlier):
    model = dataclasses.replace(MODEL, init=str(earlier / "model"), config={}, words=())
    _, train, frozen = begin(ADAPTER, model)
    assert all(np.all(np.asarray(v) == 0.5) for v in paths.flatten(train.params).values())
    assert not any(".lora_" in name for name in paths.flatten(frozen))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(rank=4), ["rank 2", "this run has rank 4", "lora.rank=2"]),
        (dict(rslora=False), ["scale 2.12", "scale 1.5", "lora.rslora=True"]),
        (dict(targets=("head",)), ["mlp.down", "targets that include those"]),
    ],
)
@pytest.mark.parametrize("kind", ["workdir", "model"])
def test_adapters_that_mean_something_else_are_refused(earlier, kind, change, says):
    lora = dataclasses.replace(ADAPTER, init=str(earlier / kind), **change)
    with pytest.raises(MMJaxError) as error:
        begin(lora)
    for part in (*says, str(earlier / kind)):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", ["workdir", "workdir/checkpoints/7", "model"])
def test_adapters_that_are_not_all_that_was_trained_are_refused(earlier, tmp_path, kind):
    """Alone they are half of a model: the rest would be that of model.init, without a word."""
    copy = shutil.copytree(earlier, tmp_path / "copy")
    about = json.loads((copy / "workdir" / "config.json").read_text())
    (copy / "workdir" / "config.json").write_text(json.dumps(about | {"train": ["patch_embed.*"]}))
    about = json.loads((copy / "model" / "config.json").read_text())
    about["mmjax"]["trained"] = ["patch_embed.*"]
    (copy / "model" / "config.json").write_text(json.dumps(about))
    start = copy / ("model" if kind == "model" else "workdir/model")
    says = rf"{kind}: patch_embed\.\* was trained with its adapters.*set model\.init to {start},"
    with pytest.raises(MMJaxError, match=says):
        begin(dataclasses.replace(ADAPTER, init=str(copy / kind)))


def test_the_data_of_a_run_on_a_model_with_adapters_can_be_checked(earlier):
    model = dataclasses.replace(MODEL, init=str(earlier / "model"), config={}, words=())
    sums = dict(sums=dict(kind="sums", split="test", size=3))
    data = DataSettings(sums, seq_len=96, max_patches=8, max_targets=8)
    (report,) = check.check(RunSettings(model=model, lora=ADAPTER, data=data))
    assert (report.records, report.good) == (3, 3)


def test_a_workdirs_adapters_keep_their_scale(earlier, tmp_path):
    """Checkpoints do not tell it: at another the same numbers are another model."""
    names = begin(ADAPTER)[0].names()
    adapters.check_same(
        earlier / "workdir", LoRA(2, 3.0, ("attn.q", "mlp.down", "mlp.up"), True), names
    )
    adapters.check_same(tmp_path, LoRA(2, 6.0, ("attn.q",)), names)  # nothing to go by
    other = LoRA(2, 6.0, ("attn.q", "mlp.down", "mlp.up"), True)
    with pytest.raises(MMJaxError, match=r"workdir holds adapters .*scale 2\.12.*lora\.alpha=3,"):
        adapters.check_same(earlier / "workdir", other, names)
    shutil.copytree(earlier / "workdir" / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(MMJaxError, match="config.json, .* is missing or damaged"):
        begin(dataclasses.replace(ADAPTER, init=str(tmp_path)))


def test_a_workdir_in_place_of_a_model_is_told(earlier, tmp_path):
    text = (earlier / "workdir" / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    says = f"{tmp_path}: a workdir of train.py, not a model; its model is {tmp_path}/model"
    with pytest.raises(MMJaxError, match=f"{says}, which it writes when it ends"):
        opening.open_pretrained(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(MMJaxError, match=f"it ends, and .*from_run {tmp_path} DST makes a model"):
        opening.open_pretrained(tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(MMJaxError, match=f"{says}$"):
        opening.open_pretrained(tmp_path)


def test_a_checkpoint_in_place_of_a_model_is_told_and_not_called_rubbish(earlier):
    (step,) = (earlier / "workdir" / "checkpoints").iterdir()
    says = f"{step}: a checkpoint of a run, .*one when it ends, {earlier / 'workdir' / 'model'}"
    with pytest.raises(MMJaxError, match=says) as error:
        opening.open_pretrained(step)
    assert "delete" not in str(error.value)


def test_full_training_of_a_model_with_adapters_says_to_merge_them(earlier):
    model = dataclasses.replace(MODEL, init=str(earlier / "model"), config={}, words=())
    with pytest.raises(MMJaxError, match=r"lora\.rank=2 to go on.*convert_weights\.merge"):
        build.blueprint(model, LoRASettings(), 0)
