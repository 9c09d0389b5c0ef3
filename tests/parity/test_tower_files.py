"""Towers whose files tell less, or another thing, than those of the published ones."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.models.towers import open_tower, tower_in
from mmjax.models.vision_config import CLIP, SIGLIP, asked_config, read_vision_config
from mmjax.models.vit import ViTConfig
from mmjax.types import MMJaxError
from mmjax.weights.writer import Arrays
from tests.parity import vision_peer

TINY = dict(d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_mlp=24, num_layers=2,
            image_size=13, patch_size=4)  # fmt: skip
SAID = dict(num_attention_heads=2, image_size=13)


def config_of(tower):
    return read_vision_config(tower.config)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14", "vit_base_patch16_siglip_256"])
def test_other_published_widths_need_no_config_either(name):
    want = read_vision_config(asked_config(name))
    layout = "hf_clip" if want.class_token else "hf_siglip"
    for cut in (0, 1):  # layers that are missing behind the feature
        file = vision_peer.published(want, layout, cut=cut)
        got = config_of(tower_in(file, "it", feature_layer=-2))
        layers = want.num_layers - cut
        assert got == dataclasses.replace(want, num_layers=layers, feature_layer=-2 + cut)
        assert got.layers_run == want.num_layers - 1
    with pytest.raises(MMJaxError, match="says: intermediate_size 8 "):  # as of one that is whole
        tower_in(file, "it", feature_layer=-2, stated={"intermediate_size": 8})


def test_more_layers_than_the_published_of_a_width_leave_the_feature_where_it_is():
    deep = dataclasses.replace(SIGLIP, d_model=768, num_heads=12, num_kv_heads=12, head_dim=64,
                               d_mlp=48, num_layers=14)  # fmt: skip
    got = config_of(tower_in(vision_peer.published(deep, "hf_siglip"), "it", feature_layer=-2))
    assert (got.num_layers, got.feature_layer) == (14, -2)


@pytest.mark.parametrize("layout", ["hf_clip", "open_clip"])
def test_sizes_that_the_tensors_do_not_have_are_refused(layout):
    file = vision_peer.published(dataclasses.replace(CLIP, **TINY), layout)
    assert config_of(tower_in(file, "it", stated=SAID)).image_size == 13
    other = SAID | {"model_type": "siglip_vision_model"}  # the tensors say what they are
    assert tower_in(file, "it", stated=other).config == tower_in(file, "it", stated=SAID).config
    grey = vision_peer.published(dataclasses.replace(CLIP, num_channels=1, **TINY), layout)
    assert config_of(tower_in(grey, "it", stated=SAID)).num_channels == 1
    with pytest.raises(MMJaxError, match=r"config.json says: image_size 16 \(the tensors: 12\)"):
        tower_in(file, "it", stated=SAID | {"image_size": 16})
    with pytest.raises(MMJaxError, match=r"hidden_size 8 \(the tensors: 16\)"):
        tower_in(file, "it", stated=SAID | {"hidden_size": 8})


def test_the_published_tower_that_it_is_is_named():
    file = vision_peer.published(dataclasses.replace(CLIP, num_layers=1), "open_clip")
    with pytest.raises(MMJaxError, match="give the config it was trained with"):
        tower_in(file, "it", asked="ViT-L-14")
    file = vision_peer.published(CLIP, "open_clip")
    with pytest.raises(MMJaxError, match="the tensors: 224.*; it has the sizes of vit-l-14$"):
        tower_in(file, "it", asked="ViT-L-14-336")


def test_another_patch_projection_is_refused():
    file = vision_peer.published(dataclasses.replace(CLIP, **TINY), "hf_clip")
    arrays = {key: file.read(key) for key in file.keys()}  # noqa: SIM118
    # As SigLIP 2 of any resolution has it.
    flat = arrays["embeddings.patch_embedding.weight"].reshape(16, 48)
    with pytest.raises(MMJaxError, match=r"shape \[16, 48\]; only a convolution"):
        tower_in(Arrays(arrays | {"embeddings.patch_embedding.weight": flat}), "it", stated=SAID)
    lacking = {key: x for key, x in arrays.items() if "position_embedding" not in key}
    with pytest.raises(
        MMJaxError, match=r"tower lacks embeddings.position_embedding.weight, which"
    ):
        tower_in(Arrays(lacking), "it", stated=SAID)
    with pytest.raises(MMJaxError, match="it: no vision tower: "):
        tower_in(Arrays({"my_conv1.weight": np.zeros((16, 3, 4, 4))}), "it")
    with pytest.raises(MMJaxError, match="it begins with nothing"):
        tower_in(Arrays({}), "it")


def test_the_json_of_open_clip_counts_before_that_of_transformers(tmp_path):
    config = dataclasses.replace(CLIP, **TINY)
    file = vision_peer.published(config, "open_clip")
    arrays = {f"visual.{key}": np.array(file.read(key)) for key in file.keys()}  # noqa: SIM118
    save_file(arrays, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    about = dict(width=16, layers=2, head_width=8, mlp_ratio=1.5, patch_size=4, image_size=13)
    about = json.dumps({"model_cfg": {"quick_gelu": True, "vision_cfg": about}})
    (tmp_path / "open_clip_config.json").write_text(about)
    assert config_of(open_tower(tmp_path)) == config
    # What the folder says of itself counts before what is said for it, what is asked before both.
    assert config_of(open_tower(tmp_path, stated={"hidden_size": 8})) == config
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps(SAID | {"image_size": 14, "hidden_act": "gelu"}))
    got = config_of(open_tower(tmp_path, asked=asked))
    assert (got.image_size, got.activation) == (14, "gelu")
    asked.write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(
        MMJaxError, match=r"not what --vision-config .*asked.json says: hidden_size"
    ):
        open_tower(tmp_path, asked=asked)
    for name in ("config.json", "open_clip_config.json"):
        (tmp_path / name).unlink()
    assert config_of(open_tower(tmp_path, stated=SAID)) == config


def test_what_stands_before_a_towers_names_is_left_alone():
    """Of a checkpoint with another model in it, in the names of a tower too."""
    tiny = ViTConfig(**TINY)
    file = vision_peer.published(tiny, "hf_clip")
    inside = {f"model.tower.{key}": file.read(key) for key in file.keys()}  # noqa: SIM118
    # The marks of other layouts, which other models have too.
    others = ("model.x.patch_embed.proj.weight", "model.conv1.weight", "model.x.pos_embed")
    inside |= dict.fromkeys(others, np.zeros((16, 3, 4, 4)))
    inside |= {"encoder.layers.0.mlp.fc1.bias": np.zeros(3), "model.head.weight": np.zeros(3)}
    tower = tower_in(Arrays(inside), "it", root="model.", stated=SAID)
    assert config_of(tower) == tiny and set(tower.reader.keys()) == set(file.keys())
    # Of two the one with the shorter name, among those that begin with the root.
    other = vision_peer.published(dataclasses.replace(tiny, d_mlp=40), "hf_clip")
    inside |= {f"model.a.deeper.{key}": other.read(key) for key in other.keys()}  # noqa: SIM118
    inside |= {f"a.model.{key}": other.read(key) for key in other.keys()}  # noqa: SIM118
    again = tower_in(Arrays(inside), "it", root="model.", stated=SAID)
    assert config_of(again) == tiny and set(again.reader.keys()) == set(file.keys())
