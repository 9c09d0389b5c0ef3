"""The vision tower against transformers' own CLIP and SigLIP, with random weights of theirs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from mmjax.models.towers import open_tower, read_vision_config, tower_in, write_vision_config
from mmjax.models.vision_config import CLIP, SIGLIP
from mmjax.models.vit import ViTConfig
from mmjax.nn import paths
from mmjax.types import MMJaxError
from mmjax.weights.rules import WeightsMismatch, export
from mmjax.weights.writer import Arrays, write_shards
from tests.parity import vision_peer
from tests.parity.vision_peer import forward, images, opened, pixels

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
PATCHES = dict(image_size=15, patch_size=4)  # three pixels of each row are left over
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
              num_attention_heads=16, image_size=384, patch_size=14)  # fmt: skip
CLIP_336 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                num_attention_heads=16, image_size=336, patch_size=14)  # fmt: skip


def saved(peer, folder):
    peer.save_pretrained(folder)
    return peer, folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    peer = vision_peer.random_peer(CLIPVisionModel, CLIPVisionConfig(**SIZES, **PATCHES))
    return saved(peer, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A SigLIP in its folder, with the head that pools, which a tower here does not have."""
    peer = vision_peer.random_peer(SiglipVisionModel, SiglipVisionConfig(**SIZES, **PATCHES))
    assert any(name.startswith("head.") for name in peer.state_dict())
    return saved(peer, tmp_path_factory.mktemp("siglip"))


def hidden_states(peer, x):
    with torch.no_grad():
        out = peer(pixel_values=pixels(x), output_hidden_states=True)
    return [state.numpy() for state in out.hidden_states], out.last_hidden_state.numpy()


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_clip_equals_transformers(clip, feature_layer):
    peer, folder = clip
    states, last = hidden_states(peer, images())
    want = states[feature_layer][:, 1:]
    if feature_layer == -1:  # what Otter takes
        np.testing.assert_array_equal(want, last[:, 1:])
    got = forward(opened(folder, feature_layer), images())
    assert got.shape == (2, 9, 32) and np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_siglip_and_its_gradients_equal_transformers(siglip):
    peer, folder = siglip
    graphdef, params = opened(folder)
    cos = np.cos(np.arange(2 * 9 * 32, dtype=np.float32)).reshape(2, 9, 32)
    loss = lambda p: (lambda out: (jnp.sum(out * cos), out))(nnx.merge(graphdef, p)(images()))  # noqa: E731
    grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    want = peer(pixel_values=pixels(images()), output_hidden_states=True).hidden_states[-2]
    assert want.abs().max() > 1
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)
    peer.zero_grad()
    (want * torch.from_numpy(cos)).sum().backward()
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    grads = {f"vision.{name}": np.asarray(g) for name, g in paths.flatten(grads).items()}
    ours = {t.key: t.make() for t in export(vision_peer.rules("hf_siglip"), Arrays(grads))}
    assert ours.keys() == {name for name in theirs if not name.startswith("head.")}
    for name, grad in ours.items():
        if theirs[name] is None:  # behind the layer whose output is taken
            assert not grad.any() and ("layers.2." in name or "post_layernorm" in name), name
            continue
        size = np.linalg.norm(theirs[name].numpy())
        # The sum of a softmax does not feel what is added to every score: the gradient is noise.
        if name.endswith("k_proj.bias"):
            assert max(size, np.linalg.norm(grad)) < 1e-4
            continue
        assert np.linalg.norm(grad - theirs[name].numpy()) < 1e-4 * size, name


def test_a_siglip_with_its_last_norm_equals_transformers(siglip):
    peer, folder = siglip
    tower = open_tower(folder)
    config = dataclasses.replace(read_vision_config(tower.config), final_norm="applied")
    states, last = hidden_states(peer, images())
    assert np.abs(last - states[-1]).max() > 0.1
    np.testing.assert_allclose(
        forward(vision_peer.parts_of(tower, config), images()), last, atol=2e-5
    )


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_tower_written_back_is_the_peers_again(family, request, tmp_path):
    peer, folder = request.getfixturevalue(family)
    tower = open_tower(folder, feature_layer=-2)
    assert (tower.layout, tower.config["feature_layer"]) == (f"hf_{family}", -2)
    assert (tower.config["image_size"], tower.config["hidden_act"]) == (
        (15, "quick_gelu") if family == "clip" else (15, "gelu_pytorch_tanh")
    )
    _, params = vision_peer.parts_of(tower)
    named = {f"vision.{name}": value for name, value in paths.flatten(params).items()}
    write_shards(tmp_path, export(vision_peer.rules(tower.layout), Arrays(named)))
    (tmp_path / "config.json").write_text(json.dumps(tower.config))
    again, info = type(peer).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = peer.state_dict()
    assert again.state_dict().keys() == {k for k in state if not k.startswith("head.")}
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_names_of_every_version_of_transformers_are_one(siglip, tmp_path):
    """Up to version 4 with ``vision_model.``, and so in a whole SigLIP beside its text tower."""
    peer, folder = siglip
    want = open_tower(folder, feature_layer=-2)
    assert not any("head." in key or "vision_model" in key for key in want.reader.keys())  # noqa: SIM118
    peer.save_pretrained(tmp_path)

    def older(key):
        return "text_model.probe" if key == "head.probe" else f"vision_model.{key}"

    vision_peer.rewrite(tmp_path, older)
    sizes = {k: v for k, v in want.config.items() if k != "hidden_act"}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": sizes}))
    got = open_tower(tmp_path, feature_layer=-2)
    assert (got.layout, got.config) == (want.layout, want.config)
    assert set(got.reader.keys()) == set(want.reader.keys())
    inside = Arrays({f"model.tower.{k}": got.reader.read(k) for k in got.reader.keys()})  # noqa: SIM118
    deep = tower_in(inside, "it", root="model.tower.", feature_layer=-2, stated=sizes)
    assert deep.config == want.config and set(deep.reader.keys()) == set(want.reader.keys())
    with pytest.raises(MMJaxError, match="it: no vision tower: neither visual.conv1.weight"):
        tower_in(inside, "it", root="vision.")


def test_a_tower_may_lack_what_lies_behind_its_feature(siglip, tmp_path):
    """Bunny's first release deletes SigLIP's last layer and its head."""
    peer = siglip[0]
    peer.save_pretrained(tmp_path)
    vision_peer.rewrite(
        tmp_path, lambda k: None if k.startswith(("encoder.layers.2.", "head.")) else k
    )
    config = read_vision_config(open_tower(tmp_path, feature_layer=-2).config)
    assert (config.num_layers, config.feature_layer, config.layers_run) == (2, -1, 2)
    want = hidden_states(peer, images())[0][-2]
    np.testing.assert_allclose(forward(opened(tmp_path), images()), want, atol=1e-5)
    with pytest.raises(MMJaxError, match=r"num_hidden_layers 3 .the tensors: 2."):
        open_tower(tmp_path)
    vision_peer.rewrite(tmp_path, lambda k: None if k == "encoder.layers.0.mlp.fc2.bias" else k)
    with pytest.raises(WeightsMismatch, match="1 missing: encoder.layers.0.mlp.fc2.bias"):
        opened(tmp_path)


def test_published_towers_need_no_config():
    for layout, config in (
        ("hf_siglip", SIGLIP),
        ("hf_clip", dataclasses.replace(CLIP, image_size=336)),
        ("open_clip", dataclasses.replace(CLIP, image_size=336)),
    ):
        tower = tower_in(vision_peer.published(config, layout), "it", feature_layer=-2)
        assert tower.layout == layout
        assert read_vision_config(tower.config) == dataclasses.replace(config, feature_layer=-2)
    cut = read_vision_config(
        tower_in(vision_peer.published(SIGLIP, "hf_siglip", cut=1), "it", feature_layer=-2).config
    )
    assert cut == dataclasses.replace(SIGLIP, num_layers=26) and cut.layers_run == 26
    wide = ViTConfig(d_model=1536, num_heads=16, num_kv_heads=16, head_dim=96, num_layers=1)
    with pytest.raises(MMJaxError, match="1536 wide, and its heads cannot .* num_attention_heads"):
        tower_in(vision_peer.published(wide, "hf_clip"), "it")


@pytest.mark.parametrize(
    "make, theirs, config",
    [
        (CLIPVisionModel, CLIPVisionConfig(**CLIP_336), dataclasses.replace(CLIP, image_size=336)),
        (SiglipVisionModel, SiglipVisionConfig(**SO400M, vision_use_head=False), SIGLIP),
    ],
    ids=["clip", "siglip"],
)
def test_published_towers_have_as_many_weights_as_theirs(make, theirs, config):
    with torch.device("meta"):
        want = sum(p.numel() for p in make(theirs).parameters())
    assert vision_peer.count(config) == want
    sizes = {key: value for key, value in theirs.to_dict().items() if key != "hidden_act"}
    assert read_vision_config(sizes) == read_vision_config(theirs.to_dict()) == config
    assert config.num_patches == (576 if config.class_token else 729)


def test_a_config_of_no_family_is_refused_both_ways():
    with pytest.raises(MMJaxError, match="model_type 'dinov2', no vision tower of mmjax; one of "):
        read_vision_config({"model_type": "dinov2"})
    with pytest.raises(MMJaxError, match="hidden_size 1152 and num_attention_heads 7, which does"):
        read_vision_config({"model_type": "siglip_vision_model", "num_attention_heads": 7})
    with pytest.raises(ValueError, match="switches of none of clip_vision_model, siglip"):
        write_vision_config(ViTConfig(position="none"))
