"""Write fuyu_processor.npz: what transformers' own FuyuProcessor (torchvision) makes of pictures.

torchvision is needed here and nowhere else, so it stays out of the test environment:

    pip install --no-deps --target /tmp/torchvision torchvision==0.28.0
    PYTHONPATH=/tmp/torchvision:. python tests/golden/make_fuyu_processor_goldens.py

Made with transformers 5.23.0, torch 2.13.0, torchvision 0.28.0. Holds, for every case, the source
picture (uint8[h,w,3]), the peer's input_ids, its patches turned back into grey levels, and, for
Fuyu-8B's own settings, the patch grids of a table of image sizes.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

# The wheel's C++ operators do not load beside a CPU-only torch, and importing torchvision then
# fails on two names. Declaring them is enough: only the pure-python transforms are used.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import FuyuImageProcessor, FuyuProcessor  # noqa: E402

from mmjax.data.tokenizers_small import build_word_tokenizer  # noqa: E402

PROMPT = "Generate a coco-style caption.\n"
SIZES = {  # (width, height) of the source, for patches of 8 and a box of 64 x 96 (h x w)
    "whole_patches": (48, 32),
    "ragged": (90, 50),
    "exactly_the_box": (96, 64),
    "too_wide": (140, 60),
    "too_large": (150, 110),
    "too_tall": (30, 150),
}
TABLE = [  # (width, height), Fuyu-8B's patches of 30 and box of 1080 x 1920
    (224, 224),
    (448, 448),
    (512, 512),
    (768, 768),
    (1024, 1024),
    (1080, 1080),
    (1440, 1440),
    (1920, 1080),
    (2466, 1766),
    (640, 400),
    (64, 300),
]


def picture(width, height):
    """Draw gradients with edges and fine texture, in integer arithmetic."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = x * 255 // width, y * 255 // height, (x * 5 ^ y * 3) % 256
    return np.stack([red, green, blue], -1).astype(np.uint8)


def levels(patches):
    """Turn the peer's normalised floats back into the grey levels they were."""
    grey = (patches.double().numpy() * 0.5 + 0.5) * 255
    assert np.abs(grey - np.round(grey)).max() < 1e-3
    return np.round(grey).astype(np.uint8)


def main():
    tokenizer = build_word_tokenizer([PROMPT])
    size, patch = {"height": 64, "width": 96}, {"height": 8, "width": 8}
    small = FuyuProcessor(FuyuImageProcessor(size=size, patch_size=patch), tokenizer)
    arrays = {}
    for name, (width, height) in SIZES.items():
        image = picture(width, height)
        out = small(images=image, text=PROMPT, return_legacy_image_output=False)
        arrays[f"{name}/image"] = image
        arrays[f"{name}/ids"] = out["input_ids"][0].numpy().astype(np.int32)
        arrays[f"{name}/patches"] = levels(out["pixel_values"])
    full = FuyuProcessor(FuyuImageProcessor(), tokenizer)
    grids = []
    for width, height in TABLE:
        image = np.zeros((height, width, 3), np.uint8)
        ids = full(images=image, text=PROMPT)["input_ids"][0]
        rows = int((ids == full.image_newline_id).sum())
        grids.append((rows, int((ids == full.image_token_id).sum()) // rows))
    arrays["table/sizes"], arrays["table/grids"] = np.int32(TABLE), np.int32(grids)
    target = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fuyu_processor.npz")
    np.savez_compressed(target, **arrays)
    print(target, os.path.getsize(target), dict(zip(TABLE, grids, strict=True)))


if __name__ == "__main__":
    main()
