"""Write eva.npz: what Bunny's own EVA-02, and timm's, make of tiny random weights.

    .venv-flamingo/bin/python tests/golden/make_eva_goldens.py --bunny CHECKOUT \\
        --out tests/golden/eva.npz

CHECKOUT: of github.com/BAAI-DCAI/Bunny. One file of it runs, with torch, einops and timm: the
environment of make_flamingo_goldens.py has them. xformers is not needed: its attention is left off.

Arrays:
  config        json: vision_cfg as EVA-CLIP has it; `buffers`, their keys of angles and shapes;
                `timm`, each key of timm -> Bunny's of the same tensor; `parameters` of the
                published tower without its head
  w/<key>       int8, Bunny's state dict: value = code / 64
  images        f32[2,3,24,24]; features f32[2,36,32], Bunny's; timm f32[2,36,32]
  probe         like features; g/<key>: gradient of sum(features * probe), where there is any
"""

import argparse
import functools
import importlib.util
import json
import os
import sys
import types

import numpy as np
import torch
from flamingo_peer import import_torchvision

FILE = "bunny/model/multimodal_encoder/eva_clip/eva_vit.py"
SIZES = dict(image_size=24, patch_size=4, width=32, layers=3, head_width=16, mlp_ratio=2.6667)
PUBLISHED = dict(
    image_size=336, patch_size=14, width=1024, layers=24, head_width=64, mlp_ratio=2.6667
)
GRID = 4  # of 6 patches a side: positions are fractions, as 24 patches are on the published 16
STEP = 1 / 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bunny", required=True, metavar="CHECKOUT")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    import_torchvision()
    peer = bunny(args.bunny, **SIZES, grid=GRID)
    whole = bunny(args.bunny, **PUBLISHED, grid=16)
    parameters = sum(p.numel() for n, p in whole.named_parameters() if not n.startswith("head."))
    del whole
    weights = {name: random_codes(name, p) for name, p in peer.named_parameters()}
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p.copy_(torch.from_numpy(weights[name]) * STEP)
    images = torch.randn(2, 3, SIZES["image_size"], SIZES["image_size"])
    features = peer(images, return_all_features=True)[:, 1:]
    other, names = timm_features(peer, images)
    difference = (features - other).abs().max().item()
    print(f"Bunny and timm differ by {difference:.1e}, of up to {features.abs().max().item():.1f}")
    assert difference < 1e-5
    probe = torch.randn(features.shape)
    (features * probe).sum().backward()
    grads = {n: p.grad.numpy() for n, p in peer.named_parameters() if p.grad is not None}
    cfg = SIZES | dict(pt_hw_seq_len=GRID, eva_model_name="tiny")
    buffers = {name: list(b.shape) for name, b in peer.state_dict().items() if name not in weights}
    config = {"vision_cfg": cfg, "buffers": buffers, "timm": names, "parameters": parameters}
    arrays = dict(images=images, features=features.detach(), timm=other.detach(), probe=probe)
    np.savez_compressed(
        args.out,
        config=json.dumps(config),
        **{name: value.numpy() for name, value in arrays.items()},
        **{f"w/{name}": value for name, value in weights.items()},
        **{f"g/{name}": value for name, value in grads.items()},
    )


def bunny(checkout, *, image_size, patch_size, width, layers, head_width, mlp_ratio, grid):
    """Return Bunny's tower of these sizes, with the switches of its Eva2LargePlusEncoder."""
    sys.modules["xformers"] = types.ModuleType("xformers")
    sys.modules["xformers.ops"] = sys.modules["xformers"].ops = types.ModuleType("xformers.ops")
    spec = importlib.util.spec_from_file_location("eva_vit", os.path.join(checkout, FILE))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.EVAVisionTransformer(
        img_size=image_size, patch_size=patch_size, num_classes=8, embed_dim=width, depth=layers,
        mlp_ratio=mlp_ratio, num_heads=width // head_width, qkv_bias=True, use_mean_pooling=False,
        norm_layer=functools.partial(module.LayerNorm, eps=1e-6), xattn=False, rope=True,
        pt_hw_seq_len=grid, intp_freq=True, naiveswiglu=True, subln=True,
    ).eval()  # fmt: skip


def random_codes(name, p):
    """Return int8 codes of a parameter: matrices over their fan-in, scales of norms around 1."""
    size = 0.3 if p.ndim == 1 or p.shape[0] == 1 else p[0].numel() ** -0.5
    scale = "norm" in name or "_ln" in name
    value = torch.randn(p.shape) * size + float(scale and name.endswith("weight"))
    return (value / STEP).round().clamp(-127, 127).to(torch.int8).numpy()


def timm_features(peer, images):
    """Return the same features by timm, and its names of the tensors."""
    from timm.models import eva

    model = eva.Eva(
        img_size=SIZES["image_size"], patch_size=SIZES["patch_size"], num_classes=8,
        embed_dim=SIZES["width"], depth=SIZES["layers"], mlp_ratio=SIZES["mlp_ratio"],
        num_heads=SIZES["width"] // SIZES["head_width"], qkv_fused=False, swiglu_mlp=True,
        scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(GRID, GRID),
        global_pool="token",
    ).eval()  # fmt: skip
    published = {f"visual.{name}": value for name, value in peer.state_dict().items()}
    # timm tells EVA-CLIP's file by this name, and renames its keys.
    state = eva.checkpoint_filter_fn(published, model)
    model.load_state_dict(state)
    theirs = {id(value): name.removeprefix("visual.") for name, value in published.items()}
    names = {name: theirs[id(value)] for name, value in state.items()}
    out = model.forward_intermediates(
        images, indices=[SIZES["layers"] - 2], norm=False, intermediates_only=True,
        output_fmt="NLC",
    )  # fmt: skip
    return out[0], names


if __name__ == "__main__":
    main()
