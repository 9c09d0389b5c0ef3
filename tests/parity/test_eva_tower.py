"""EVA02-CLIP's tower against the numbers of Bunny's own code and of timm's."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

from mmjax.models.towers import open_tower, read_vision_config, tower_in
from mmjax.models.vision_config import EVA02
from mmjax.nn import paths
from mmjax.types import MMJaxError
from mmjax.weights.rules import export
from mmjax.weights.writer import Arrays
from tests.parity import vision_peer
from tests.parity.vision_peer import parts_of

GOLDEN = Path(__file__).parents[1] / "golden" / "eva.npz"
LEFT = "head."  # no part of a tower here


@pytest.fixture(scope="module")
def golden():
    data = dict(np.load(GOLDEN))
    config = json.loads(str(data.pop("config")))
    data |= {
        k: np.float32(v) / 64 if k.startswith("w/") else v for k, v in data.items()
    }  # 64: what the codes count
    return config, data


def under(data, prefix):
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def published(golden):
    """The state dict of EVA-CLIP's visual part, angles and all."""
    config, data = golden
    buffers = {k: np.zeros(shape, np.float32) for k, shape in config["buffers"].items()}
    assert "rope.freqs_cos" in buffers and "blocks.0.attn.rope.freqs_sin" in buffers
    return under(data, "w/") | buffers


@pytest.fixture(scope="module")
def tower(golden):
    whole = {f"visual.{k}": v for k, v in published(golden).items()}
    whole |= {"logit_scale": np.float32(4.6), "text.transformer.resblocks.0.ln_1.bias": np.ones(3)}
    return tower_in(Arrays(whole), "it", feature_layer=-2, stated=golden[0])


def test_features_and_gradients_equal_the_peers(golden, tower):
    _, data = golden
    np.testing.assert_allclose(data["timm"], data["features"], atol=1e-5)
    config = read_vision_config(tower.config)
    assert (config.num_layers, config.layers_run, config.d_mlp, config.rope_grid) == (3, 2, 85, 4)
    graphdef, params = parts_of(tower)
    x = data["images"].transpose(0, 2, 3, 1)

    def loss(params):
        out = nnx.merge(graphdef, params)(x)
        return jnp.sum(out * data["probe"]), out

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert np.abs(data["features"]).max() > 1
    np.testing.assert_allclose(got, data["features"], atol=1e-5)
    grads = {f"vision.{name}": np.asarray(g) for name, g in paths.flatten(grads).items()}
    ours = {t.key: t.make() for t in export(vision_peer.rules("eva"), Arrays(grads))}
    theirs = under(data, "g/")
    assert not theirs.keys() - ours.keys()
    for name, grad in ours.items():
        if name not in theirs:  # behind the layer whose output is taken
            assert not grad.any() and name.startswith(("blocks.2.", "norm.")), name
            continue
        size = np.linalg.norm(theirs[name])
        assert np.linalg.norm(grad - theirs[name]) < 1e-4 * size, name


def test_patches_know_their_place_by_more_than_the_table(golden, tower):
    """Without the table the class token tells rows and columns apart by nothing but rotation."""
    _, data = golden
    graphdef, params = parts_of(tower)
    names = paths.flatten(params)
    blank = paths.replace(params, names | {"positions": jnp.zeros_like(names["positions"])})
    x = data["images"].transpose(0, 2, 3, 1)
    straight, turned = (
        vision_peer.forward((graphdef, blank), a) for a in (x, x.transpose(0, 2, 1, 3))
    )
    assert np.abs(np.asarray(straight) - turned).max() > 0.1


def test_what_is_written_back_is_the_published_file(golden, tower):
    _, params = parts_of(tower)
    named = {f"vision.{name}": value for name, value in paths.flatten(params).items()}
    out = {t.key: t.make() for t in export(vision_peer.rules("eva"), Arrays(named))}
    want = under(golden[1], "w/")
    assert out.keys() == {k for k in want if not k.startswith(LEFT)}
    for name, value in out.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_every_way_it_is_published_is_read_as_one(golden, tower, tmp_path):
    config, data = golden
    state = {k: torch.from_numpy(v.copy()) for k, v in published(golden).items()}
    timm = {k: state[v].clone() for k, v in config["timm"].items()}
    nested = {f"module.visual.{k}": v for k, v in state.items()}
    torch.save({"epoch": 1, "state_dict": nested}, tmp_path / "nested.pt")
    save_file(timm, tmp_path / "timm.safetensors")
    (tmp_path / "open_clip").mkdir()
    trunk = {f"visual.trunk.{k}": v for k, v in timm.items()} | {"logit_scale": torch.ones(())}
    save_file(trunk, tmp_path / "open_clip" / "model.safetensors")
    name = {"timm_model_name": "eva02_large_patch14_clip_336", "image_size": 24, "timm_proj": None}
    file = tmp_path / "open_clip" / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": name}}))
    sizes = {k: tower.config[k] for k in ("num_attention_heads", "pt_hw_seq_len", "image_size")}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    want = set(tower.reader.keys())
    assert want == {k for k in under(data, "w/") if not k.startswith(LEFT)}
    for path, said in (
        ("nested.pt", {"stated": config}),
        ("timm.safetensors", {"stated": sizes}),
        ("open_clip", {"asked": tmp_path / "sizes.json"}),
    ):
        got = open_tower(tmp_path / path, feature_layer=-2, **said)
        assert (got.layout, got.config, set(got.reader.keys())) == ("eva", tower.config, want)
        for key in want:
            np.testing.assert_array_equal(got.reader.read(key), data[f"w/{key}"])
    with pytest.raises(MMJaxError, match="32 wide, and its heads cannot be read off its tensors"):
        open_tower(tmp_path / "open_clip")
    inside = Arrays({f"model.vision_tower.vision_tower.model.{k}": v for k, v in state.items()})
    root = "model.vision_tower.vision_tower."
    got = tower_in(inside, "it", root=root, feature_layer=-2, stated=sizes)
    assert got.config == tower.config and set(got.reader.keys()) == want


def test_another_vit_of_timm_is_refused():
    other = {"patch_embed.proj.weight": (8, 3, 4, 4), "pos_embed": (1, 5, 8)}
    other |= {"blocks.0.mlp.fc1.weight": (16, 8)}
    other = Arrays({k: np.zeros(shape, np.float32) for k, shape in other.items()})
    with pytest.raises(MMJaxError, match="lacks blocks.0.mlp.w2.weight, which every eva02_clip"):
        tower_in(other, "it")


def test_the_published_one_needs_no_config_and_has_as_many_weights_as_theirs(golden):
    file = vision_peer.published(EVA02, "eva")
    config = read_vision_config(tower_in(file, "it", feature_layer=-2).config)
    assert config.layers_run == 23 and (config.image_size, config.num_patches) == (336, 576)
    assert vision_peer.count(EVA02) == golden[0]["parameters"]
