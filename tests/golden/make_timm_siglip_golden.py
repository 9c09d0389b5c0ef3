"""Write timm_siglip.npz: what timm's own SigLIP makes of tiny random weights.

    python tests/golden/make_timm_siglip_golden.py --out tests/golden/timm_siglip.npz

It runs with torch 2.13.0 on a CPU, timm 1.0.31, open_clip 3.3.0 and torchvision.

Arrays:
  config        json: the config.json that timm writes beside the weights
  published     json: of open_clip's ViT-SO400M-14-SigLIP-384, `config`, its model_cfg, and `shapes`
                of all its tensors by key
  w/<key>       int8, timm's state dict: value = code / 64
  images        f32[2,3,15,15], of 3 x 3 patches and three pixels beyond
  features      f32[2,9,32], output of the last block but one
  last          f32[2,9,32], output of the last one behind the norm
"""

import argparse
import json
import os
import tempfile

import numpy as np
import torch
from flamingo_peer import import_torchvision

NAME, OPEN_CLIP = "vit_so400m_patch14_siglip_384", "ViT-SO400M-14-SigLIP-384"
# timm runs this name with an exact GELU, SigLIP was trained with the other.
SIZES = dict(img_size=15, patch_size=4, embed_dim=32, depth=3, num_heads=4, mlp_ratio=1.5,
             act_layer="gelu_tanh")  # fmt: skip
STEP = 1 / 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import_torchvision()
    import timm

    peer = timm.create_model(NAME, **SIZES).eval()
    weights = {name: random_codes(name, p) for name, p in peer.named_parameters()}
    assert weights.keys() == peer.state_dict().keys()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p.copy_(torch.from_numpy(weights[name]) * STEP)
    images = torch.randn(2, 3, SIZES["img_size"], SIZES["img_size"])
    with torch.no_grad():
        (features,) = peer.forward_intermediates(
            images, indices=[SIZES["depth"] - 2], norm=False, intermediates_only=True,
            output_fmt="NLC",
        )  # fmt: skip
        last = peer.forward_features(images)
    np.savez_compressed(
        args.out,
        config=json.dumps(written_config(peer)),
        published=json.dumps(published()),
        images=images.numpy(),
        features=features.numpy(),
        last=last.numpy(),
        **{f"w/{name}": value for name, value in weights.items()},
    )
    print(
        f"{args.out}: {os.path.getsize(args.out) / 1e3:.0f} kB, features to {features.abs().max()}"
    )


def random_codes(name, p):
    """Return int8 codes of a parameter: matrices over their fan-in, scales of norms around 1."""
    size = 0.3 if p.ndim == 1 or p.shape[0] == 1 else p[0].numel() ** -0.5
    scale = "norm" in name and name.endswith("weight")
    value = torch.randn(p.shape) * size + float(scale)
    return (value / STEP).round().clamp(-127, 127).to(torch.int8).numpy()


def written_config(peer):
    from timm.models import save_for_hf

    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(peer, folder, model_args=SIZES)
        with open(os.path.join(folder, "config.json")) as f:
            return json.load(f)


def published():
    """Return the config and the tensors' shapes of the published one, without memory."""
    import open_clip

    config = open_clip.get_model_config(OPEN_CLIP)
    with torch.device("meta"):
        model = open_clip.model.CustomTextCLIP(
            **{k: v for k, v in config.items() if k != "custom_text"}
        )
    return {"config": config, "shapes": {k: list(v.shape) for k, v in model.state_dict().items()}}


if __name__ == "__main__":
    main()
