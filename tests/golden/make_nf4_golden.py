"""Write nf4_bitsandbytes.npz: what bitsandbytes' quantize_4bit makes of a small weight on a CPU.

    python tests/golden/make_nf4_golden.py --out tests/golden/nf4_bitsandbytes.npz

Needs torch and bitsandbytes (0.50.2 made the file). Blocks of 64, quant_type nf4, without
compress_statistics.

Arrays: weight f32[out, in] as torch has it, one block of it zero; codes u8[out, in / 2];
maxima f32[out, in / 64]; values f32[out, in], what dequantize_4bit returns
"""

import argparse

import numpy as np
import torch
from bitsandbytes import functional

OUT, IN = 6, 192


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[2, 64:128] = 0
    weight[3] *= 40
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    np.savez_compressed(
        args.out,
        weight=weight.numpy(),
        codes=codes.numpy().reshape(OUT, IN // 2),
        maxima=state.absmax.numpy().reshape(OUT, IN // 64),
        values=functional.dequantize_4bit(codes, state).numpy(),
    )


if __name__ == "__main__":
    main()
