"""Write bunny_s2.npz: what the S2 wrapper in Bunny's repository makes of small images.

    .venv-flamingo/bin/python tests/golden/make_bunny_s2_goldens.py --bunny CHECKOUT \\
        --out tests/golden/bunny_s2.npz

CHECKOUT: of github.com/BAAI-DCAI/Bunny. Its bunny/util/s2wrapper runs, with torch and einops. The
tower is a linear map of patches of 7 x 7 pixels, at scales of 21, 42 and 63 pixels.

Arrays: tower f32[7,7,3,d], rows, columns, channels of a patch; and for images of two sides, the
largest scale and one that divides none, `<side>/...`:
  images int8[b,side,side,3], worth 1/64 each; out f32[b,9,3d]; probe like out;
  g_tower: gradient of sum(out * probe)
"""

import argparse
import sys

import numpy as np
import torch

PATCH, TILE, SCALES, WIDTH = 7, 21, [21, 42, 63], 4
SIDES = (63, 50)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bunny", required=True, metavar="CHECKOUT")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    sys.path.insert(0, f"{args.bunny}/bunny/util")  # the package alone, without Bunny's own
    from s2wrapper.core import forward

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(WIDTH, 3, PATCH, PATCH, generator=generator) / 8
    arrays = {"tower": kernel.permute(2, 3, 1, 0).numpy()}
    for side in SIDES:
        one = run(forward, kernel.clone().requires_grad_(), side, generator)
        arrays |= {f"{side}/{name}": value.detach().numpy() for name, value in one.items()}
    np.savez_compressed(args.out, **arrays)


def run(forward, kernel, side, generator):
    def tower(x):
        return torch.nn.functional.conv2d(x, kernel, stride=PATCH).flatten(2).transpose(1, 2)

    codes = torch.randint(-128, 128, (2, side, side, 3), generator=generator, dtype=torch.int8)
    pixels = codes.permute(0, 3, 1, 2).float() / 64
    out = forward(tower, pixels, img_sizes=SCALES, max_split_size=TILE)
    probe = torch.randn(out.shape, generator=generator)
    (out * probe).sum().backward()
    return dict(images=codes, out=out, probe=probe, g_tower=kernel.grad.permute(2, 3, 1, 0))


if __name__ == "__main__":
    main()
