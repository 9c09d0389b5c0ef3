"""Load a folder that mmjax wrote into Otter's own class, and compare its logits.

    .venv-otter/bin/python tests/golden/check_otter_export.py --otter CHECKOUT \\
        --export build/otter/export/mpt --golden build/otter/otter_mpt.npz

CHECKOUT: as for make_otter_goldens.py, in the same environment. --export: a folder of
`convert_weights.to_hf`; OtterForConditionalGeneration.from_pretrained reads config and weights.
Fails when a tensor is missing or not known, and above 1e-6 of the largest logit.
"""

import argparse
import contextlib
import io
import os
import sys

import numpy as np
import otter_peer as peer
import torch

LIMIT = 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--otter", required=True, metavar="CHECKOUT")
    parser.add_argument("--export", required=True)
    parser.add_argument("--golden", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.breakpointhook = sys.stdin = None  # the peer debugs what it does not know: an error here
    owner = peer.import_peer(os.path.abspath(args.otter)).OtterForConditionalGeneration
    with contextlib.redirect_stdout(io.StringIO()):  # it prints each parameter
        model, report = owner.from_pretrained(args.export, output_loading_info=True)
    left = {k: v for k, v in report.items() if v}
    if left:
        raise SystemExit(f"{args.export}: {left}")
    with np.load(args.golden) as file:
        names = ("vision_x", "input_ids", "attention_mask")
        vision, ids, mask = (torch.from_numpy(file[name]) for name in names)
        want = file["logits"]
    with torch.no_grad():
        got = model.eval()(vision_x=vision, lang_x=ids, attention_mask=mask).logits.numpy()
    seen = mask.numpy() > 0
    error = np.abs(got - want)[seen].max() / np.abs(want[seen]).max()
    print(f"{args.export}: {len(model.state_dict())} tensors, largest error {error:.1e}")
    if not error <= LIMIT:
        raise SystemExit(f"logits differ by {error:.1e} of the largest; at most {LIMIT} is right")


if __name__ == "__main__":
    main()
