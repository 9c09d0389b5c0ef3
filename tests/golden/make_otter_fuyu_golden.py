"""Write otter_fuyu.npz: what OtterHD's own training makes of the small files of otter_data.py.

    PYTHONPATH=. .venv-otter/bin/python tests/golden/make_otter_fuyu_golden.py --otter CHECKOUT \\
        --out tests/golden/otter_fuyu.npz

CHECKOUT and environment: as for make_otter_goldens.py. A row at a time through MimicitDataset and
its collate with the `fuyu` format: prepare_fuyu, then FuyuProcessor of
src/otter_ai/models/fuyu/processing_fuyu.py with the image processor of transformers 4.35.1. For
each row, named <case>/<id>: /tokens and /labels int32[t], /patches float32[n,8*8*3].
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import make_otter_data_golden as golden
import numpy as np
import otter_data as files

from mmjax.data.tokenizers_small import build_word_tokenizer

HARD_CODED = 71122  # Fuyu's <0x04>, which the peer's data code names by its id


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--otter", required=True, metavar="CHECKOUT")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    checkout = os.path.abspath(args.otter)
    sys.path.insert(0, os.path.join(checkout, "src"))
    peer, _ = golden.import_peer(checkout)
    processor = make_processor(checkout)
    arrays = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files.write_files(folder)
        for case in files.FUYU_CASES:
            arrays |= read(peer, processor, folder, case)
    np.savez_compressed(args.out, **arrays)
    print(args.out, os.path.getsize(args.out), [key for key in arrays if key.endswith("tokens")])


def make_processor(checkout):
    """Return the peer's processor with a small tokenizer, whose <0x04> has an id of its own."""
    # By its file: the package around it imports Fuyu's model, with flash attention.
    from importlib.util import module_from_spec, spec_from_file_location

    path = os.path.join(checkout, "src/otter_ai/models/fuyu/processing_fuyu.py")
    spec = spec_from_file_location("processing_fuyu", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    from transformers import FuyuImageProcessor

    class Processor(module.FuyuProcessor):
        def get_labels(self, input_ids, special_token_id):
            assert special_token_id == HARD_CODED
            return super().get_labels(input_ids, self.tokenizer.vocab["<0x04>"])

        def find_and_remove_tokens(self, input_ids, labels, token_id):
            assert token_id == HARD_CODED
            return super().find_and_remove_tokens(input_ids, labels, self.tokenizer.vocab["<0x04>"])

    height, width = files.FUYU_BOX
    images = FuyuImageProcessor(
        size=dict(height=height, width=width),
        patch_size=dict(height=files.FUYU_PATCH, width=files.FUYU_PATCH),
    )
    return Processor(images, build_word_tokenizer(files.FUYU_WORDS))


def read(peer, processor, folder, case):
    """Return the arrays of a case's rows."""
    dataset = golden.make(peer, folder, case)
    dataset.args.model_name, dataset.args.dynamic_resolution = "fuyu", False
    dataset.instruction_format = "fuyu"
    dataset.tokenizer = processor.tokenizer
    dataset.bos_item[:] = dataset.eos_item[:] = 0  # of a row that the Fuyu's part does not read
    arrays, side = {}, files.FUYU_SIDE
    for i in range(len(dataset)):
        batch = dataset.collate([dataset[i]], processor, (side, side))
        data, name = batch["fuyu_data"], f"{case}/{batch['id'][0]}"
        arrays[f"{name}/tokens"] = data["input_ids"][0].numpy().astype(np.int32)
        arrays[f"{name}/labels"] = data["labels"][0].numpy().astype(np.int32)
        arrays[f"{name}/patches"] = data["image_patches"][0][0].numpy()
    return arrays


if __name__ == "__main__":
    main()
