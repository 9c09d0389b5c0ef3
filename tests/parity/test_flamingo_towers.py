"""CLIP's tokens and the resampler's latents against the numbers of OpenFlamingo's own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models.flamingo.perceiver import Perceiver, PerceiverConfig
from mmjax.models.vit import ViT, ViTConfig
from mmjax.nn import paths
from tests.parity import flamingo_golden

NORM = (("scale", "weight"), ("bias", "bias"))


@pytest.fixture(scope="module", params=flamingo_golden.paths(), ids=lambda path: path.stem)
def golden(request):
    return flamingo_golden.load(request.param)


def stacked(weights, pattern, change=lambda x: x):
    """Return one array of all layers: ``change(weights[pattern.format(layer)])``, [l, ...]."""
    found = []
    while pattern.format(len(found)) in weights:
        found.append(change(weights[pattern.format(len(found))]))
    return np.stack(found)


def filled(module, values):
    """Return the module's parts with every parameter of the values, none missing or left over."""
    graphdef, params = nnx.split(module)
    wanted = {name: leaf.shape for name, leaf in paths.flatten(params).items()}
    assert wanted == {name: value.shape for name, value in values.items()}
    values = {name: jnp.asarray(value) for name, value in values.items()}
    return graphdef, paths.replace(params, values)


@jax.jit
def forward(parts, x):
    return nnx.merge(*parts)(x)


def tower(golden):
    """Our tower with open_clip's weights."""
    size, weights = golden.config["tower"], golden.weights
    d, h = size["width"], size["head_width"]
    prefix, layer = "vision_encoder.", "vision_encoder.transformer.resblocks.{}."

    def of_layer(name, change=lambda w: w):
        return stacked(weights, layer + name, change)

    values = {
        "class_token": weights[f"{prefix}class_embedding"],
        "positions": weights[f"{prefix}positional_embedding"],
        "embed.kernel": weights[f"{prefix}conv1.weight"].transpose(2, 3, 1, 0),
        "layers.attn.o.kernel": of_layer(
            "attn.out_proj.weight", lambda w: w.T.reshape(d // h, h, d)
        ),
        "layers.attn.o.bias": of_layer("attn.out_proj.bias"),
    }
    for i, name in enumerate("qkv"):
        rows = slice(i * d, (i + 1) * d)
        values[f"layers.attn.{name}.kernel"] = of_layer(
            "attn.in_proj_weight", lambda w, rows=rows: w[rows].T.reshape(d, d // h, h)
        )
        values[f"layers.attn.{name}.bias"] = of_layer(
            "attn.in_proj_bias", lambda w, rows=rows: w[rows].reshape(d // h, h)
        )
    for ours, theirs in (("up", "c_fc"), ("down", "c_proj")):
        values[f"layers.mlp.{ours}.kernel"] = of_layer(f"mlp.{theirs}.weight", np.transpose)
        values[f"layers.mlp.{ours}.bias"] = of_layer(f"mlp.{theirs}.bias")
    for ours, theirs in NORM:
        values[f"pre_norm.{ours}"] = weights[f"{prefix}ln_pre.{theirs}"]
        values[f"final_norm.{ours}"] = weights[f"{prefix}ln_post.{theirs}"]
        values[f"layers.attn_norm.{ours}"] = of_layer(f"ln_1.{theirs}")
        values[f"layers.mlp_norm.{ours}"] = of_layer(f"ln_2.{theirs}")
    made = ViTConfig(
        d_model=d, num_heads=d // h, num_kv_heads=d // h, head_dim=h, d_mlp=4 * d,
        num_layers=size["layers"], image_size=size["image_size"], patch_size=size["patch_size"],
    )  # fmt: skip
    return filled(ViT(made, rngs=nnx.Rngs(0)), values)


def resampler(golden):
    """Our resampler with the peer's weights."""
    weights = golden.weights
    d = weights["perceiver.latents"].shape[1]

    def heads(part):
        return lambda w: w.reshape(-1, 8, 64, d)[part].transpose(2, 0, 1)

    def of_layer(name, change=lambda w: w):
        return stacked(weights, f"perceiver.layers.{{}}.{name}", change)

    values = {
        "latents": weights["perceiver.latents"],
        "layers.attn.q.kernel": of_layer("0.to_q.weight", heads(0)),
        "layers.attn.k.kernel": of_layer("0.to_kv.weight", heads(0)),
        "layers.attn.v.kernel": of_layer("0.to_kv.weight", heads(1)),
        "layers.attn.o.kernel": of_layer("0.to_out.weight", lambda w: w.T.reshape(8, 64, d)),
        "layers.mlp.up.kernel": of_layer("1.1.weight", np.transpose),
        "layers.mlp.down.kernel": of_layer("1.3.weight", np.transpose),
    }
    norms = {"media_norm": "0.norm_media", "latent_norm": "0.norm_latents", "mlp_norm": "1.0"}
    for ours, theirs in NORM:
        values[f"final_norm.{ours}"] = weights[f"perceiver.norm.{theirs}"]
        for norm, key in norms.items():
            values[f"layers.{norm}.{ours}"] = of_layer(f"{key}.{theirs}")
    return filled(Perceiver(PerceiverConfig(d_model=d), rngs=nnx.Rngs(0)), values)


def test_clip_tokens_before_the_last_norm_equal_the_peer(golden):
    pixels = golden.vision_x.reshape(-1, *golden.vision_x.shape[3:])
    got = forward(tower(golden), pixels.transpose(0, 2, 3, 1))
    assert np.abs(golden.clip_tokens).max() > 1
    largest = np.abs(golden.clip_tokens).max()  # 8 or so: other CPUs round otherwise
    np.testing.assert_allclose(got, golden.clip_tokens, atol=3e-6 * largest)


def test_latents_equal_the_peer(golden):
    want = golden.perceiver_out  # [b, m, n, d]
    media = golden.clip_tokens.reshape(*want.shape[:2], 1, -1, want.shape[-1])
    assert np.abs(want).max() > 1
    # Of the largest number: the peer's own float32 is up to 1.2e-5 away from float64 here.
    assert flamingo_golden.relative_error(forward(resampler(golden), media), want) < 1e-5
