"""Both stages of a Bunny, from a language model and a tower in files: cut, resumed, handed on."""

import shutil

import jax
import numpy as np
import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM, SiglipVisionConfig, SiglipVisionModel

from mmjax.config import apply_overrides, resolve_recipe
from mmjax.data.templates_bunny import ENDS
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.parallel.mesh import make_mesh
from mmjax.recipes import BUNNY_TOY, BUNNY_WORDS
from mmjax.schema import to_dataclass
from mmjax.train import loop
from mmjax.train.settings import RunSettings
from tests.e2e import faults

RECIPE = "configs/bunny_phi2_siglip.py"
OVERRIDES = ("steps=4", "checkpoint.every=2", "log.every=1", "eval.final=False", "model.words=()")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model with its tokenizer and a tower, as transformers saves them."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(BUNNY_WORDS)
    tokenizer.add_special_tokens({"eos_token": ENDS["bunny"]})
    sizes = {k: BUNNY_TOY[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    language = PhiConfig(
        **sizes, num_attention_heads=4, vocab_size=len(tokenizer), eos_token_id=None
    )
    PhiForCausalLM(language).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    tower = SiglipVisionConfig(**BUNNY_TOY["vision_config"])
    SiglipVisionModel(tower).save_pretrained(folder / "tower")
    return folder


def run(stage, workdir, **model):
    """Train a stage's toy, on what ``model`` says in place of random weights."""
    config = resolve_recipe(f"{RECIPE}:{stage},quick", OVERRIDES)
    ratio = config.model.config.image_aspect_ratio
    config = apply_overrides(config, [f"model.config={{'image_aspect_ratio': '{ratio}'}}"])
    with config.unlocked():
        config.model.update(model)
    loop.run(to_dataclass(RunSettings, config), workdir)


@pytest.mark.heavy
def test_either_stage_goes_on_where_it_was_cut_bit_for_bit(parts, tmp_path):
    """Stage 1 from parts, the projector alone; stage 2 from what it left, adapters beside it."""
    given = dict(lm=str(parts / "lm"), vision=str(parts / "tower"))
    weights = {}
    for stage, start in (
        ("pretrain", dict(parts=given)),
        ("lora", dict(init=str(tmp_path / "pretrain" / "model"))),
    ):
        run(stage, tmp_path / stage, **start)
        cut = tmp_path / "cut" / stage
        shutil.copytree(tmp_path / stage, cut)
        for later in ("checkpoints/4", "model"):
            shutil.rmtree(cut / later)
        run(stage, cut, **start)
        assert len(faults.logged(cut)) == 6  # two steps again
        faults.assert_equal_runs(cut, tmp_path / stage)
        weights[stage] = faults.parameters(tmp_path / stage)

    first, second = weights["pretrain"], weights["lora"]
    with torch.no_grad():
        embedding = PhiForCausalLM.from_pretrained(parts / "lm").model.embed_tokens.weight.numpy()
    np.testing.assert_array_equal(first["decoder.embed.embedding"], embedding)
    moved = {name for name in first if (first[name] != second[name]).any()}
    assert moved == {name for name in first if name.startswith("projector.")}
    added = second.keys() - first.keys()
    assert {name.rsplit(".", 1)[-1] for name in added} == {"lora_a", "lora_b"}
    assert all(second[name].any() for name in added)
