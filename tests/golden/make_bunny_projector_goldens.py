"""Write bunny_projectors.npz: what Bunny's own connectors make of tiny random weights.

    .venv-flamingo/bin/python tests/golden/make_bunny_projector_goldens.py --bunny CHECKOUT \\
        --out tests/golden/bunny_projectors.npz

CHECKOUT: of github.com/BAAI-DCAI/Bunny. One file of it runs, with torch, torchvision and timm: the
environment of make_flamingo_goldens.py has them.

Arrays, under the name of each kind, `<kind>/...`:
  w/<name>   every weight; g/<name>: its gradient of sum(out * probe), where it has any
  features   f32[2,16,8], a grid of 4 x 4; out f32[2,n,d]; probe like out; g_features
  odd, odd_out     f32[1,25,8] and what it becomes, a grid of 5 x 5, for the kinds that see a grid
and `squeezed` int[k,2]: d_model, and the width inside ldp's squeeze-and-excitation.
"""

import argparse
import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import torch
from flamingo_peer import import_torchvision

KINDS = (
    "linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "identity", "minigpt", "vanilla", "ldp",
    "sppv1", "sppv2", "sppv3",
)  # fmt: skip
VISION, MODEL, SIDE, ODD = 8, 16, 4, 5
WIDTHS = (16, 24, 40, 64, 1000, 2048, 2560, 4096)
FILE = "bunny/model/multimodal_projector/builder.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bunny", required=True, metavar="CHECKOUT")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    import_torchvision()
    spec = importlib.util.spec_from_file_location("builder", os.path.join(args.bunny, FILE))
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for kind in KINDS:
        one = run(builder, kind, generator)
        arrays |= {f"{kind}/{name}": value.detach().numpy() for name, value in one.items()}
    arrays["squeezed"] = np.array([[d, squeezed(builder, d)] for d in WIDTHS])
    np.savez_compressed(args.out, **arrays)


def run(builder, kind, generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator)

    width = VISION if kind == "identity" else MODEL
    config = SimpleNamespace(mm_projector_type=kind, mm_hidden_size=VISION, hidden_size=width)
    peer = builder.build_vision_projector(config).eval()
    out = {}
    for name, weight in peer.named_parameters():
        with torch.no_grad():
            weight.copy_(drawn(name, weight.shape, normal))
        out[f"w/{name}"] = weight
    features = normal(2, SIDE**2, VISION).requires_grad_()
    result = peer(features)
    probe = normal(*result.shape)
    (result * probe).sum().backward()
    out |= dict(features=features, out=result, probe=probe, g_features=features.grad)
    grads = {f"g/{n}": w.grad for n, w in peer.named_parameters() if w.grad is not None}
    if kind == "ldp" or kind.startswith("spp"):
        out["odd"] = normal(1, ODD**2, VISION)
        out["odd_out"] = peer(out["odd"])
    return out | grads


def drawn(name, shape, normal):
    """Weights that keep every part at work: norms with a small variance, gates in their slope."""
    if name.endswith("0.0.weight"):  # ldp's convolution of each channel
        return 0.01 * normal(*shape)
    if name.endswith(".1.weight") and len(shape) == 1:  # its norms
        return 2 + normal(*shape)
    if len(shape) == 1:
        return normal(*shape)
    return 1.5 * shape[1] ** -0.5 * normal(*shape)


def squeezed(builder, d):
    with torch.device("meta"):
        block = builder.LDPBlock(SimpleNamespace(mm_hidden_size=8, hidden_size=d)).mb_block[1]
    return block.block[1].fc1.out_channels


if __name__ == "__main__":
    main()
