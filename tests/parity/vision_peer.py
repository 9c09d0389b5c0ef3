"""Random towers of transformers in folders as people have them, and ours opened from those."""

import math

import jax
import numpy as np
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from mmjax.models import vit_tables
from mmjax.models.towers import open_tower
from mmjax.models.vision_config import read_vision_config
from mmjax.models.vit import ViT
from mmjax.nn import paths
from mmjax.weights.load import load_params
from mmjax.weights.rules import expected
from mmjax.weights.writer import Arrays


def random_peer(make, config):
    torch.manual_seed(0)
    peer = make(config).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            scale = 0.3 if p.ndim == 1 else 1.2 * math.prod(p.shape[1:]) ** -0.5
            p.copy_(torch.randn(p.shape) * scale + float("norm" in name and "weight" in name))
    return peer


def images(size=15):
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def pixels(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def rewrite(folder, change):
    """Write a folder's tensors again under the names ``change`` gives, None for gone."""
    file = folder / "model.safetensors"
    state = {change(k): v for k, v in load_file(file).items()}
    save_file({k: v for k, v in state.items() if k is not None}, file)


def timm_siglip(state):
    """A SigLIP of transformers in timm's names, without the head."""
    renames = (
        ("embeddings.patch_embedding.", "patch_embed.proj."),
        ("embeddings.position_embedding.weight", "pos_embed"),
        ("encoder.layers.", "blocks."),
        (".layer_norm", ".norm"),
        (".self_attn.out_proj.", ".attn.proj."),
        (".self_attn.q_proj.", ".attn.qkv."),
        ("post_layernorm.", "norm."),
    )
    out = {}
    for key, value in state.items():
        if key.startswith("head.") or "k_proj" in key or "v_proj" in key:
            continue
        if "q_proj" in key:
            value = torch.cat([state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        value = value[None] if "position_embedding" in key else value
        for old, new in renames:
            key = key.replace(old, new)
        out[key] = value
    return out


def rules(layout):
    return vit_tables.table(layout, "")


def parts_of(tower, config=None):
    """Our tower with the tensors of a folder: every one of them is claimed."""
    config = config or read_vision_config(tower.config)
    graphdef, params = jax.eval_shape(lambda: nnx.split(ViT(config, rngs=nnx.Rngs(0))))
    abstract = {f"vision.{name}": leaf for name, leaf in paths.flatten(params).items()}
    values = load_params(tower.reader, rules(tower.layout), abstract)
    values = {name.removeprefix("vision."): value for name, value in values.items()}
    return graphdef, paths.replace(params, values)


def opened(path, feature_layer=-2, **kwargs):
    return parts_of(open_tower(path, feature_layer=feature_layer, **kwargs))


@jax.jit
def forward(parts, x):
    return nnx.merge(*parts)(x)


def abstract(config):
    """Our parameters of a tower by name, without memory."""
    return paths.flatten(jax.eval_shape(lambda: nnx.split(ViT(config, rngs=nnx.Rngs(0)))[1]))


def count(config):
    return sum(math.prod(leaf.shape) for leaf in abstract(config).values())


def published(config, layout, cut=0):
    """The tensors of a published tower, without memory."""
    shapes = {f"vision.{name}": leaf.shape for name, leaf in abstract(config).items()}
    keys = expected(rules(layout), shapes)
    last = f"encoder.layers.{config.num_layers - cut}."
    return Arrays(
        {k: np.broadcast_to(np.float32(0), s) for k, s in keys.items() if not k.startswith(last)}
    )
