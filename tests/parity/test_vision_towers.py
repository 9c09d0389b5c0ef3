"""The vision tower against transformers' own CLIP and SigLIP, with random weights of theirs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from mmjax.models.vit import ViT, ViTConfig
from mmjax.nn import paths
from mmjax.weights.rules import Rule, conv_patch, flat, read_piece, reshape_in, transpose
from mmjax.weights.writer import Arrays

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
OURS = dict(d_model=32, d_mlp=48, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8)
PATCHES = dict(image_size=15, patch_size=4)  # three pixels of each row are left over
LAYER = "encoder.layers.{l}."


def rules(config):
    """Their names of our parameters, as both models of transformers have them."""
    patch, positions = "embeddings.patch_embedding", "embeddings.position_embedding.weight"
    yield Rule("embed.kernel", f"{patch}.weight", conv_patch)
    yield Rule("positions", positions)
    norms = {"layers.attn_norm": f"{LAYER}layer_norm1", "layers.mlp_norm": f"{LAYER}layer_norm2"}
    if config.final_norm != "none":
        norms["final_norm"] = "post_layernorm"
    if config.class_token:
        yield Rule("class_token", "embeddings.class_embedding")
    if config.pre_norm:
        norms["pre_norm"] = "pre_layrnorm"
    if config.patch_bias:
        yield Rule("embed.bias", f"{patch}.bias")
    for ours, theirs in norms.items():
        yield Rule(f"{ours}.scale", f"{theirs}.weight")
        yield Rule(f"{ours}.bias", f"{theirs}.bias")
    maps = {name: (f"self_attn.{name}_proj", transpose, flat) for name in "qkv"}
    maps["o"] = ("self_attn.out_proj", reshape_in(2), flat)
    maps = {f"attn.{name}": value for name, value in maps.items()}
    maps |= {"mlp.up": ("mlp.fc1", transpose, flat), "mlp.down": ("mlp.fc2", transpose, flat)}
    for ours, (theirs, kernel, bias) in maps.items():
        yield Rule(f"layers.{ours}.kernel", f"{LAYER}{theirs}.weight", kernel)
        yield Rule(f"layers.{ours}.bias", f"{LAYER}{theirs}.bias", bias)


def ours_of(peer, config):
    """Our tower with the peer's weights."""
    state = {k.removeprefix("vision_model."): v.numpy() for k, v in peer.state_dict().items()}
    graphdef, params = nnx.split(ViT(config, rngs=nnx.Rngs(0)))
    shapes = {name: leaf.shape for name, leaf in paths.flatten(params).items()}
    table = {rule.ours: rule for rule in rules(config)}
    assert table.keys() == shapes.keys()
    values = {
        name: jnp.asarray(
            read_piece(
                table[name], Arrays(state), shape, tuple(slice(0, n) for n in shape), np.float32
            )
        )
        for name, shape in shapes.items()
    }
    return graphdef, paths.replace(params, values)


def random_peer(make, config):
    torch.manual_seed(0)
    peer = make(config).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            scale = 0.3 if p.ndim == 1 else 1.2 * math.prod(p.shape[1:]) ** -0.5
            p.copy_(torch.randn(p.shape) * scale + float("norm" in name and "weight" in name))
    return peer


def images():
    return np.random.default_rng(0).normal(size=(2, 15, 15, 3)).astype(np.float32)


@jax.jit
def forward(parts, x):
    return nnx.merge(*parts)(x)


def hidden_states(peer, x):
    pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        out = peer(pixel_values=pixels, output_hidden_states=True)
    return [state.numpy() for state in out.hidden_states], out.last_hidden_state.numpy()


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_clip_equals_transformers(feature_layer):
    peer = random_peer(CLIPVisionModel, CLIPVisionConfig(**SIZES, **PATCHES))
    config = ViTConfig(**OURS, **PATCHES, feature_layer=feature_layer)
    states, last = hidden_states(peer, images())
    want = states[feature_layer][:, 1:]
    if feature_layer == -1:  # what Otter takes
        np.testing.assert_array_equal(want, last[:, 1:])
    got = forward(ours_of(peer, config), images())
    assert got.shape == (2, config.num_patches, 32) and np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("final_norm", ["applied", "kept"])
def test_siglip_equals_transformers(final_norm):
    sizes = SiglipVisionConfig(**SIZES, **PATCHES, vision_use_head=False)
    peer = random_peer(SiglipVisionModel, sizes)
    config = ViTConfig(
        **OURS, **PATCHES, class_token=False, pre_norm=False, patch_bias=True, norm_eps=1e-6,
        activation="gelu_tanh", final_norm=final_norm,
    )  # fmt: skip
    states, last = hidden_states(peer, images())
    want = last if final_norm == "applied" else states[-1]
    got = forward(ours_of(peer, config), images())
    assert np.abs(last - states[-1]).max() > 0.1
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_clip_large_has_as_many_weights_as_theirs():
    with torch.device("meta"):
        sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
        theirs = CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=16, patch_size=14))
    shapes = jax.eval_shape(lambda: nnx.split(ViT(ViTConfig(), rngs=nnx.Rngs(0)))[1])
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert ours == sum(p.numel() for p in theirs.parameters())
