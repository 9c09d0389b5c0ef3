"""Towers by their published names and in others' JSON: what is read, and what is refused."""

import json

import pytest

from mmjax.models.vision_config import (
    CLIP,
    EVA02,
    SIGLIP,
    asked_config,
    read_vision_config,
    stated_config,
)
from mmjax.types import MMJaxError


def sizes(config):
    return (
        *(config.d_model, config.num_layers, config.num_heads, config.head_dim, config.d_mlp),
        *(config.patch_size, config.image_size, config.activation),
    )


# Radford et al. 2021, table 20, and LAION's ViT-H; SigLIP's of Zhai et al. 2023, Alabdulmohsin
# et al. 2023 (so400m) and Tschannen et al. 2025.
@pytest.mark.parametrize(
    "name, want",
    [
        ("ViT-B/32", (768, 12, 12, 64, 3072, 32, 224, "quick_gelu")),
        ("ViT-B-16", (768, 12, 12, 64, 3072, 16, 224, "quick_gelu")),
        ("ViT-L-14", (1024, 24, 16, 64, 4096, 14, 224, "quick_gelu")),
        ("ViT-L/14@336px", (1024, 24, 16, 64, 4096, 14, 336, "quick_gelu")),
        ("ViT-H-14", (1280, 32, 16, 80, 5120, 14, 224, "gelu")),
        ("ViT-H-14-quickgelu", (1280, 32, 16, 80, 5120, 14, 224, "quick_gelu")),
        ("vit_base_patch16_siglip_224", (768, 12, 12, 64, 3072, 16, 224, "gelu_tanh")),
        ("vit_base_patch32_siglip_256.v2_webli", (768, 12, 12, 64, 3072, 32, 256, "gelu_tanh")),
        ("vit_large_patch16_siglip_gap_384", (1024, 24, 16, 64, 4096, 16, 384, "gelu_tanh")),
        ("vit_so400m_patch14_siglip_384", (1152, 27, 16, 72, 4304, 14, 384, "gelu_tanh")),
        ("vit_giantopt_patch16_siglip_256", (1536, 40, 16, 96, 6144, 16, 256, "gelu_tanh")),
    ],
)
def test_a_published_name_tells_all_sizes(name, want):
    config = read_vision_config(asked_config(name))
    assert sizes(config) == want
    assert config.class_token == config.pre_norm == ("siglip" not in name)


# The JSON of open_clip and EVA-CLIP says what differs from a ViT-B-16.
@pytest.mark.parametrize(
    "said, want",
    [
        ({}, (768, 12, 12, 64, 3072, 16, 224, "gelu")),
        (
            dict(image_size=336, layers=24, width=1024, patch_size=14),
            (1024, 24, 16, 64, 4096, 14, 336, "gelu"),
        ),
        (
            dict(layers=48, width=1664, head_width=104, mlp_ratio=4.9231, patch_size=14),
            (1664, 48, 16, 104, 8192, 14, 224, "gelu"),
        ),
    ],
)
def test_the_json_of_open_clip_is_read(tmp_path, said, want):
    for config in ({"vision_cfg": said}, {"model_cfg": {"vision_cfg": said}}):
        assert sizes(read_vision_config(stated_config(config))) == want
    quick = stated_config({"quick_gelu": True, "vision_cfg": said})
    assert sizes(read_vision_config(quick)) == (*want[:-1], "quick_gelu")
    (tmp_path / "config.json").write_text(json.dumps({"vision_cfg": said}))
    assert asked_config(tmp_path) == stated_config({"vision_cfg": said})


def test_the_json_of_eva_clip_is_read():
    said = dict(image_size=336, layers=24, width=1024, mlp_ratio=2.6667, patch_size=14)
    said |= dict(eva_model_name="eva-clip-l-14-336", rope=True, pt_hw_seq_len=12, subln=True)
    config = stated_config({"vision_cfg": said})
    assert read_vision_config({"model_type": "eva02_clip", **config}).rope_grid == 12
    del said["pt_hw_seq_len"]
    config = stated_config({"vision_cfg": said})
    assert read_vision_config({"model_type": "eva02_clip", **config}) == EVA02


def test_the_json_of_timm_is_read():
    name = {"architecture": "vit_so400m_patch14_siglip_384"}
    assert read_vision_config(stated_config(name)) == SIGLIP
    about = name | {"pretrained_cfg": {"input_size": [3, 378, 378]}}
    assert read_vision_config(stated_config(about)).image_size == 378
    args = dict(embed_dim=96, depth=3, num_heads=4, img_size=48, patch_size=16, act_layer="gelu")
    config = stated_config(about | {"model_args": args})
    assert "intermediate_size" not in config  # its tensors tell
    got = read_vision_config(config | {"intermediate_size": 200})
    assert sizes(got) == (96, 3, 4, 24, 200, 16, 48, "gelu")
    assert stated_config({"architecture": "eva02_large_patch14_clip_336.merged2b"}) == {}


def test_the_json_of_transformers_is_read():
    whole = {"hidden_size": 1, "vision_config": {"model_type": "siglip_vision_model", "x": 1}}
    assert stated_config(whole) == {"model_type": "siglip_vision_model"}
    for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        assert read_vision_config({"hidden_act": name}).activation == "gelu_tanh"
    assert read_vision_config({"hidden_size": 1024, "image_size": None}) == CLIP


@pytest.mark.parametrize(
    "said, says",
    [
        ({"vision_cfg": {"attentional_pool": True}}, "has attentional_pool: only CLIP's own ViT"),
        ({"vision_cfg": {"no_ln_pre": True}}, "has no_ln_pre: "),
        ({"vision_cfg": {"ls_init_value": 1e-5}}, "has ls_init_value: "),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "has several stages: "),
        ({"architecture": "vit_large_patch14_clip_336"}, "is no vision tower of mmjax: of timm's"),
    ],
)
def test_another_tower_is_refused_by_what_it_has(said, says):
    with pytest.raises(MMJaxError, match=says):
        stated_config(said)


def test_sizes_that_leave_the_heads_open_are_refused():
    with pytest.raises(MMJaxError, match="hidden_size 1280 and no num_attention_heads"):
        read_vision_config({"hidden_size": 1280})
    with pytest.raises(MMJaxError, match="activation 'mish', which is unknown"):
        read_vision_config({"hidden_act": "mish"})


def test_a_file_that_is_none_is_told(tmp_path):
    for text in ("{", "[1]", "3"):
        (tmp_path / "sizes.json").write_text(text)
        with pytest.raises(MMJaxError, match="not the JSON of a vision tower"):
            asked_config(tmp_path / "sizes.json")
