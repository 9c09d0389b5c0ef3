"""Parts of a Bunny that do not fit: each is refused by name, before anything is allocated."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

import mmjax
from convert_weights import to_jax
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models import opening, pretrained, registry
from mmjax.models.parts import Parts
from mmjax.train import build
from mmjax.train.settings import LoRASettings, ModelSettings
from mmjax.types import MMJaxError
from tests.parity import bunny_files
from tests.parity.bunny_files import PROJECTOR
from tests.parity.bunny_golden import TOWER

NO_LORA = LoRASettings()


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return bunny_files.Files("phi_siglip", tmp_path_factory.mktemp("phi"))


@pytest.fixture(scope="module")
def stablelm(tmp_path_factory):
    return bunny_files.Files("stablelm_clip", tmp_path_factory.mktemp("stablelm"))


@pytest.fixture(scope="module")
def stage1(phi):
    """A projector alone, config.json beside it."""
    state = bunny_files.part(phi.golden, PROJECTOR)
    return bunny_files.write(state, phi.folder / "1", phi.golden.config, "mm_projector.bin")


@pytest.fixture(scope="module")
def lora(phi):
    """An adapter, which names a base that is not here."""
    base = bunny_files.write_language_model(phi.golden, phi.folder / "base")
    model = bunny_files.adapted(base, bunny_files.TARGETS["phi"])
    folder = bunny_files.write_adapter(phi.golden, model, phi.folder / "lora")
    about = json.loads((folder / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = "microsoft/phi-2"
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("a tensor is read")

    monkeypatch.setattr(pretrained, "load_params", read)


def refused(match, path, **parts):
    with pytest.raises(MMJaxError, match=match):
        mmjax.load(path, **parts)


def without(folder, name, tmp_path):
    """Copy a folder but for one of its files."""
    copy = shutil.copytree(folder, tmp_path / f"without {name}")
    os.remove(copy / name)
    return copy


def changed(folder, tmp_path, **changes):
    """Copy a folder with other values in its config.json, None for none."""
    name = "-".join(map(str, (folder.name, *changes.values())))
    copy = shutil.copytree(folder, tmp_path / name)
    config = json.loads((copy / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_tower_that_does_not_fit_the_projector(phi, stablelm, stage1, tmp_path, caplog):
    narrow = SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
    SiglipVisionModel(narrow).save_pretrained(tmp_path / "narrow")
    refused("tower gives features of width 16, and the projector .mlp2x_gelu. takes 32; give the "
            "tower the projector was trained with, siglip-tiny",
            stage1, lm=phi.lm, vision=tmp_path / "narrow")  # fmt: skip
    sizes = {"vision_config": phi.sizes}
    refused("of width 96, and the projector .* takes 32",  # three scales stand side by side
            changed(phi.merged, tmp_path, use_s2=True), **sizes)  # fmt: skip
    refused("s2_scales is '384,big'; give sides in pixels",
            changed(phi.merged, tmp_path, use_s2=True, s2_scales="384,big"), **sizes)  # fmt: skip
    inside = opening.open_pretrained(phi.merged, vision=stablelm.tower, **sizes)
    assert inside.config == phi.opened.config
    assert "holds a vision tower of its own" in caplog.text and "is not used" in caplog.text
    # Of the same width, but another kind: the name in config.json is all that tells.
    opening.open_pretrained(stage1, lm=phi.lm, vision=stablelm.tower)
    assert "names the vision tower siglip-tiny, and" in caplog.text
    assert "is a clip_vision_model; the projector was hardly trained with that" in caplog.text


def test_a_tower_that_is_not_there(phi, stage1, tmp_path):
    refused("holds no vision tower, and siglip-tiny is not here; give .*--vision FILE_OR_DIR",
            stage1, lm=phi.lm)  # fmt: skip
    refused("nowhere: no such file or folder", stage1, lm=phi.lm, vision=tmp_path / "nowhere")
    bare = {k: v for k, v in phi.golden.weights.items() if not k.startswith(TOWER)}
    bare = bunny_files.write(bare, tmp_path / "bare", phi.golden.config)
    refused("bare.*holds no vision tower.*--vision FILE_OR_DIR", bare)
    refused("its heads cannot be read off its tensors; give --vision-config", phi.merged)


def test_a_language_model_that_does_not_fit(phi, stablelm, stage1, tmp_path):
    tower = {"vision": phi.tower, "vision_config": phi.sizes}
    refused("holds no language model; .* a phi model, with --lm DIR", stage1, **tower)
    refused("was trained on a phi model, and .*lm is a stablelm model; give the language model it "
            "was trained on", stage1, lm=stablelm.lm, **tower)  # fmt: skip
    (tmp_path / "mpt").mkdir()
    (tmp_path / "mpt" / "config.json").write_text('{"model_type": "mpt"}')
    refused("--lm .*mpt: a mpt model, and no Bunny has such .*those are phi, stablelm, qwen2",
            stage1, lm=tmp_path / "mpt", **tower)  # fmt: skip
    deeper = bunny_files.write_language_model(phi.golden, tmp_path / "3", num_hidden_layers=3)
    refused("another language model than .*3: their config.json say num_hidden_layers 2 and 3",
            stage1, lm=deeper, **tower)  # fmt: skip
    bare = without(stage1, "config.json", tmp_path)
    refused("no config.json of a Bunny beside it; give .*--lm DIR", bare)
    wide = {k: np.repeat(v, 2, axis=0) for k, v in bunny_files.part(phi.golden, PROJECTOR).items()}
    wide = bunny_files.write(wide, tmp_path / "wide", None, "mm_projector.bin")
    refused("its projector gives width 64, and the language model takes 32; give the language",
            wide, lm=phi.lm, **tower)  # fmt: skip
    refused("holds a language model of its own .phi.; leave --lm away",
            phi.merged, lm=phi.lm, vision_config=phi.sizes)  # fmt: skip


def test_a_projector_of_no_known_kind_and_none(phi, tmp_path):
    odd = {"model.mm_projector.foo.weight": np.zeros((32, 32), np.float32)}
    odd = bunny_files.write(odd, tmp_path / "odd", None, "mm_projector.bin")
    refused("the kind of its projector cannot be told .*put the config.json .*beside it",
            odd / "mm_projector.bin", **phi.parts)  # fmt: skip
    state, config = bunny_files.part(phi.golden, PROJECTOR), phi.golden.config
    named = bunny_files.write(state, tmp_path / "named", config | {"mm_projector_type": "mlp_gelu"},
                              "mm_projector.bin")  # fmt: skip
    refused("mm_projector_type 'mlp_gelu' is unknown; .*did you mean 'mlp2x_gelu'",
            named, **phi.parts)  # fmt: skip
    none = {k: v for k, v in phi.golden.weights.items() if not k.startswith(PROJECTOR)}
    none = bunny_files.write(none, tmp_path / "none", config)
    untrained = r"nothing holds projector.\*, which would be random numbers; .*train it first"
    refused(untrained, none, vision_config=phi.sizes)
    with pytest.raises(MMJaxError, match=untrained):
        to_jax.main([str(none), str(tmp_path / "x"), "--vision-config", str(phi.sizes)])
    refused("a language model has no --vision, --vision-config; leave that away. .*train.py takes "
            "them in model.parts", phi.lm, vision=phi.tower, vision_config=phi.sizes)  # fmt: skip


def test_a_config_json_that_names_no_bunny(phi, stage1, tmp_path):
    near = "model_type 'bunny-phy', which no family of mmjax has; did you mean 'bunny-phi'"
    refused(near, changed(phi.merged, tmp_path, model_type="bunny-phy"))
    refused(near, changed(stage1, tmp_path, model_type="bunny-phy"), **phi.parts)
    bare = without(phi.merged, "config.json", tmp_path)
    refused("no config.json of a Bunny beside it; copy it there", bare, vision_config=phi.sizes)


def test_parts_and_options_of_no_such_name(phi, stage1):
    match = "'vison' is no part of a model; one of lm, vision, .*; did you mean 'vision'"
    refused(match, stage1, lm=phi.lm, vison=phi.tower)
    with pytest.raises(MMJaxError, match=match):
        Parts.of({"vison": phi.tower})
    for init in (None, str(stage1)):
        settings = ModelSettings(family="bunny", init=init, parts={"vison": str(phi.tower)})
        with pytest.raises(MMJaxError, match=match):
            build.open_init(settings)
    refused("a Bunny has no tuning config; leave --tuning-config away",
            phi.merged, tuning_config=phi.sizes)  # fmt: skip


def test_an_adapter_without_its_base_or_its_files(phi, lora, tmp_path):
    tower = {"vision": phi.tower, "vision_config": phi.sizes}
    base = {"base": phi.folder / "base", **tower}
    refused("lora: an adapter of microsoft/phi-2; give that model's folder with --base DIR",
            lora, **tower)  # fmt: skip
    refused("nowhere: no such file or folder", lora, base=tmp_path / "nowhere", **tower)
    refused("lacks non_lora_trainables.bin, which holds what was trained of a bunny beside its",
            without(lora, "non_lora_trainables.bin", tmp_path), **base)  # fmt: skip
    refused("holds non_lora_trainables.bin beside its adapter, and no config.json",
            without(lora, "config.json", tmp_path), **base)  # fmt: skip
    refused("without adapter_config.json, which holds their scale",
            without(lora, "adapter_config.json", tmp_path), **base)  # fmt: skip
    refused("--base .* and --lm .* are given; leave one", lora, lm=phi.lm, **base)
    to_jax.main([str(phi.merged), str(tmp_path / "jax"), "--vision-config", str(phi.sizes)])
    refused("base of an adapter has to be a PyTorch checkpoint, and this one is converted; "
            "give what it was converted from, or write it for PyTorch with convert_weights.to_hf",
            lora, base=tmp_path / "jax")  # fmt: skip


def test_an_adapter_of_another_model(phi, stablelm, lora, tmp_path):
    tower = {"vision": phi.tower, "vision_config": phi.sizes}
    refused("was trained on a phi model, and .*lm is a stablelm model", lora, base=stablelm.lm,
            **tower)  # fmt: skip
    refused("an adapter of another model than --base .*: model_type bunny-stablelm and bunny-phi",
            lora, base=stablelm.merged, vision_config=stablelm.sizes)  # fmt: skip
    wide = changed(lora, tmp_path, hidden_size=64)
    refused("their config.json say hidden_size 64 and 32", wide, base=phi.lm, **tower)
    refused("of another model than --base .*: hidden_size 32 and 64", wide, base=phi.merged,
            vision_config=phi.sizes)  # fmt: skip
    state = load_file(lora / "adapter_model.safetensors")
    state = {k: np.repeat(v, 2, axis=1) if ".lora_A." in k else v for k, v in state.items()}
    unsaid = without(lora, "adapter_model.safetensors", tmp_path)
    bunny_files.write(state, unsaid, None, "adapter_model.safetensors")
    refused(r"self_attn.q_proj it is for a map \[out, in\] of \[32, 64\], and this model's is "
            r"\[32, 32\]; give its own base", unsaid, base=phi.lm, **tower)  # fmt: skip
    for name, stem in (
        ("fuyu", "language_model.model.layers.0.self_attn.query_key_value"),
        ("flamingo", "lang_encoder.transformer.blocks.0.attn.Wqkv"),
    ):
        pair = {f"base_model.model.{stem}.lora_{x}.weight": np.zeros(shape, np.float32)
                for x, shape in (("A", (4, 32)), ("B", (96, 4)))}  # fmt: skip
        folder = bunny_files.write(pair, tmp_path / name, None, "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
        refused(f"another model: of its 1 modules 1 are none of this model's, first {stem}; give",
                folder, base=phi.merged, vision_config=phi.sizes)  # fmt: skip


def test_the_end_of_an_answer_comes_from_the_tokenizer_or_is_asked_for(phi, tmp_path):
    folder = changed(phi.merged, tmp_path, eos_token_id=None)
    refused("nothing tells the token that ends an answer: .*copy the tokenizer's files there, or",
            folder, vision_config=phi.sizes)  # fmt: skip
    tokenizer = build_word_tokenizer(["a b c"])
    tokenizer.save_pretrained(folder)
    config = opening.open_pretrained(folder, vision_config=phi.sizes).config
    assert config.end_token_ids == (tokenizer.eos_token_id,) != (0,)


def test_a_processor_that_contradicts_its_model(phi, tmp_path):
    to_jax.main([str(phi.merged), str(tmp_path / "jax"), "--vision-config", str(phi.sizes)])
    processor = registry.family("bunny").Processor.from_pretrained(tmp_path / "jax")
    processor.with_options(image_aspect_ratio="square").save_pretrained(tmp_path / "jax")
    refused("processor's image_aspect_ratio is 'square' and the model's is 'pad'; correct "
            "preprocessor_config.json or config.json", tmp_path / "jax")  # fmt: skip
    with pytest.raises(MMJaxError, match="processor's image_aspect_ratio is 'square'"):
        build.blueprint(ModelSettings(family="bunny", init=str(tmp_path / "jax")), NO_LORA, 0)


def test_an_option_of_the_processor_alone_counts_for_the_model_too(phi, tmp_path, caplog):
    """As evaluators that squash a picture need it; a recipe that states both has to agree."""
    to_jax.main([str(phi.merged), str(tmp_path / "jax"), "--vision-config", str(phi.sizes)])
    asked = {"image_aspect_ratio": "square"}
    settings = ModelSettings(family="bunny", init=str(tmp_path / "jax"), processor=asked)
    assert build.blueprint(settings, NO_LORA, 0).config.image_aspect_ratio == "square"
    assert "'square', as was asked; the model's own is 'pad'" in caplog.text
    settings = dataclasses.replace(settings, config={"image_aspect_ratio": "pad"})
    with pytest.raises(MMJaxError, match="model.processor.image_aspect_ratio and model.config"):
        build.blueprint(settings, NO_LORA, 0)
