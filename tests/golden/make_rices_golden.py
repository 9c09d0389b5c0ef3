"""Let OpenFlamingo's own RICES choose examples by a CLIP in miniature.

Runs in .venv-flamingo, by `make parity-flamingo` or by hand, from the project's folder:

    PYTHONPATH=. .venv-flamingo/bin/python tests/golden/make_rices_golden.py --out FILE.npz

The pictures are blocks of colour of many shapes, so that the file stays small.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.golden.flamingo_peer import STEP, TOWER, TOWER_NAME, fill, import_peer

EXAMPLES, QUESTIONS, SHOTS = 40, 6, 5


def pictures(rng):
    """Return pictures uint8[h, w, 3], no two of one content."""
    out = []
    for _ in range(EXAMPLES + QUESTIONS):
        height, width = rng.integers(2, 7, size=2)
        blocks = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        out.append(blocks.repeat(rng.integers(5, 17), axis=0).repeat(rng.integers(5, 17), axis=1))
    return out


def write_clip(folder):
    """Write a random CLIP where open_clip finds it by a name; return its weights' file."""
    import open_clip

    text = dict(context_length=8, vocab_size=64, width=16, heads=2, layers=1)
    config = dict(embed_dim=24, quick_gelu=True, vision_cfg=TOWER, text_cfg=text)
    Path(folder, f"{TOWER_NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    model = open_clip.create_model(TOWER_NAME, pretrained=None)
    generator = torch.Generator().manual_seed(3)
    fill(model.visual, generator)
    with torch.no_grad():  # the projection is a bare parameter, and no matrix of a layer
        model.visual.proj.copy_(
            (torch.randn(16, 24, generator=generator) / STEP / 4).round() * STEP
        )
    file = Path(folder, "clip.pt")
    torch.save(model.state_dict(), file)
    return file


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    import_peer()
    import open_flamingo

    sys.path.insert(0, str(Path(open_flamingo.__file__).parent / "eval"))
    from rices import RICES

    shown = pictures(np.random.default_rng(11))
    dataset = [{"image": Image.fromarray(p), "place": i} for i, p in enumerate(shown[:EXAMPLES])]
    with tempfile.TemporaryDirectory() as folder:
        file = write_clip(folder)
        peer = RICES(dataset, "cpu", 7, TOWER_NAME, str(file))
        state = torch.load(file, weights_only=True)
    found = peer.find([Image.fromarray(p) for p in shown[EXAMPLES:]], SHOTS)
    weights = {k: v.numpy() for k, v in state.items() if k.startswith("visual.")}
    np.savez_compressed(
        args.out,
        features=peer.features.numpy(),
        found=np.array([[item["place"] for item in row] for row in found]),
        **{f"picture/{i}": picture for i, picture in enumerate(shown)},
        **{f"weight/{name}": value for name, value in weights.items()},
    )


if __name__ == "__main__":
    main()
