"""Write flamingo_processor.npz: what open_clip's validation transform makes of pictures.

OpenFlamingo uses that transform (torchvision's Resize and CenterCrop) in training and evaluation.
torchvision and open_clip are needed here and nowhere else, so they stay out of the tests'
environment:

    pip install --no-deps --target /tmp/peer torchvision==0.28.0 open_clip_torch==3.3.0 timm ftfy
    PYTHONPATH=/tmp/peer python tests/golden/make_flamingo_processor_goldens.py

Made with torch 2.13.0, torchvision 0.28.0, open_clip_torch 3.3.0, Pillow 13.0.0. Holds one array a
picture, "{width}x{height}": the normalised pixels, float32[3,20,20]; ``picture`` draws the source.
"""

from pathlib import Path

import numpy as np

SIDE = 20
# The rest that CenterCrop halves is even, 1 or 3 modulo 4, on either side, from tiny to long.
SIZES = [(640, 427), (333, 500), (30, 500), (224, 224), (20, 20), (20, 23), (27, 20), (7, 9)]


def picture(width, height):
    """Draw gradients with edges and fine texture, in integer arithmetic: uint8[h,w,3]."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = x * 255 // width, y * 255 // height, (x * 5 ^ y * 3) % 256
    return np.stack([red, green, blue], -1).astype(np.uint8)


def main():
    import torch

    # The wheel's C++ operators do not load beside a CPU-only torch; declaring two names is enough.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from open_clip import image_transform
    from PIL import Image

    transform = image_transform(SIDE, is_train=False)
    arrays = {f"{w}x{h}": transform(Image.fromarray(picture(w, h))).numpy() for w, h in SIZES}
    np.savez_compressed(Path(__file__).with_name("flamingo_processor.npz"), **arrays)


if __name__ == "__main__":
    main()
