"""SigLIP in the files of timm and open_clip, against the numbers of timm's own class."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from mmjax.models.towers import open_tower, read_vision_config, tower_in
from mmjax.models.vision_config import SIGLIP
from mmjax.nn import paths
from mmjax.types import MMJaxError
from mmjax.weights.rules import check
from mmjax.weights.writer import Arrays
from tests.parity import vision_peer
from tests.parity.vision_peer import forward, parts_of

GOLDEN = Path(__file__).parents[1] / "golden" / "timm_siglip.npz"
LEFT = "attn_pool."  # no part of a tower here
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             image_size=15, patch_size=4)  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    data = dict(np.load(GOLDEN))
    texts = {name: json.loads(str(data.pop(name))) for name in ("config", "published")}
    weights = {k.removeprefix("w/"): np.float32(data.pop(k)) / 64 for k in list(data) if "w/" in k}
    assert any(key.startswith(LEFT) for key in weights)
    return texts | data | {"weights": weights}


def tensors(golden, prefix=""):
    return {prefix + k: torch.from_numpy(v.copy()) for k, v in golden["weights"].items()}


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """A folder as timm leaves it."""
    path = tmp_path_factory.mktemp("timm")
    save_file(tensors(golden), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(golden["config"]))
    return path


def same(one, other):
    one, other = (paths.flatten(parts[1]) for parts in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_features_equal_timms(golden, folder):
    tower = open_tower(folder, feature_layer=-2)
    assert tower.config | SIZES == tower.config and tower.layout == "timm_siglip"
    assert tower.config["hidden_act"] == "gelu_pytorch_tanh"
    x = golden["images"].transpose(0, 2, 3, 1)
    assert np.abs(golden["features"]).max() > 1
    np.testing.assert_allclose(forward(parts_of(tower), x), golden["features"], atol=1e-5)
    tower = open_tower(folder)
    config = dataclasses.replace(read_vision_config(tower.config), final_norm="applied")
    np.testing.assert_allclose(forward(parts_of(tower, config), x), golden["last"], atol=2e-5)


def test_the_same_weights_in_transformers_names_are_the_same_parameters(golden, tmp_path):
    config = SiglipVisionConfig(**SIZES, vision_use_head=False)
    peer = vision_peer.random_peer(SiglipVisionModel, config)
    peer.save_pretrained(tmp_path / "theirs")
    state = vision_peer.timm_siglip(peer.state_dict())
    assert state.keys() == {key for key in golden["weights"] if not key.startswith(LEFT)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
    theirs, ours = (open_tower(x, feature_layer=-2) for x in (tmp_path / "theirs", tmp_path))
    assert (theirs.layout, theirs.config) == ("hf_siglip", ours.config)
    same(parts_of(theirs), parts_of(ours))


def test_every_way_it_is_published_is_read_as_one(golden, folder, tmp_path):
    want = open_tower(folder, feature_layer=-2)
    assert not any(LEFT in key for key in want.reader.keys())  # noqa: SIM118
    (tmp_path / "bin").mkdir()
    torch.save(tensors(golden), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "sizes.json").write_text(json.dumps({"num_attention_heads": 4, "image_size": 15}))
    (tmp_path / "open_clip").mkdir()
    whole = tensors(golden, "visual.trunk.") | {"logit_scale": torch.ones(())}
    whole |= {"text.positional_embedding": torch.ones(4, 2), "logit_bias": torch.ones(())}
    save_file(whole, tmp_path / "open_clip" / "open_clip_model.safetensors")
    for path in ("bin", "open_clip"):
        got = open_tower(tmp_path / path, feature_layer=-2, asked=tmp_path / "sizes.json")
        assert (got.layout, got.config) == ("timm_siglip", want.config)
        same(parts_of(got), parts_of(want))
    with pytest.raises(MMJaxError, match="32 wide, .* timm's name of a SigLIP such as vit_so400m"):
        open_tower(tmp_path / "bin")
    beside = json.dumps({"model_cfg": golden["published"]["config"]})
    (tmp_path / "open_clip" / "open_clip_config.json").write_text(beside)
    with pytest.raises(
        MMJaxError, match=r"its config.json says: hidden_size 1152 .the tensors: 32"
    ):
        open_tower(tmp_path / "open_clip")


def test_the_published_one_is_told_by_its_name_or_its_tensors(golden):
    """open_clip's own list of tensors: all of the tower's are claimed."""
    published = golden["published"]
    file = Arrays(
        {k: np.broadcast_to(np.float32(0), shape) for k, shape in published["shapes"].items()}
    )
    for said in ({"stated": published["config"]}, {}, {"asked": "vit_so400m_patch14_siglip_384"}):
        tower = tower_in(file, "it", feature_layer=-2, **said)
        assert read_vision_config(tower.config) == dataclasses.replace(SIGLIP, feature_layer=-2)
    shapes = {f"vision.{k}": leaf.shape for k, leaf in vision_peer.abstract(SIGLIP).items()}
    check(vision_peer.rules(tower.layout), shapes, tower.reader)
    with pytest.raises(MMJaxError, match=r"hidden_size 768 .the tensors: 1152.*patch_size 16 "):
        tower_in(file, "it", asked="vit_base_patch16_siglip_224")
    gap = {"architecture": "vit_so400m_patch14_siglip_gap_378.v2_webli", "pretrained_cfg": {}}
    assert tower_in(file, "it", stated=gap).config["image_size"] == 378


def test_what_nothing_tells_is_a_siglip_is_refused(golden):
    bare = {k: v for k, v in golden["weights"].items() if not k.startswith(LEFT)}
    with pytest.raises(MMJaxError, match="nothing says that it is a SigLIP: neither attn_pool"):
        tower_in(Arrays(bare), "it")
    tower = tower_in(Arrays(bare), "it", stated=golden["config"])
    assert tower.config["num_attention_heads"] == 4
    for stated in (
        {"architecture": "vit_base_patch16_gap_224"},
        {"vision_cfg": {"timm_model_name": "vit_base_patch16_gap_224"}},
    ):
        with pytest.raises(MMJaxError, match=r"timm's vit_base_patch16_gap_224 is no vision tower"):
            tower_in(Arrays(golden["weights"]), "it", stated=stated)
    other = Arrays(golden["weights"] | {"reg_token": np.zeros((1, 4, 32), np.float32)})
    with pytest.raises(MMJaxError, match="1 unexpected: reg_token"):
        parts_of(tower_in(other, "it", stated=golden["config"]))
