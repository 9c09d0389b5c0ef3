"""Write otter_data.npz: what Otter's own code makes of the small files of otter_data.py.

    .venv-otter/bin/python tests/golden/make_otter_data_golden.py --otter CHECKOUT \\
        --out tests/golden/otter_data.npz

CHECKOUT and environment: as for make_otter_goldens.py. Runs MimicitDataset of
pipeline/mimicit_utils/mimicit_dataset.py with its `simple` format, a row at a time through its
collate, and the function `masking` inside train_one_epoch of
pipeline/train/instruction_following.py.

  rows     json {case: [{id, tokens, labels, shape, colours}]}: of each row in the peer's order;
           shape of its pictures (1, t, f, 3, side, side), colours: the grey level of each of them
  picture  f32[3,8,8]: its pixels of a picture of 13 x 9
"""

import argparse
import ast
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import otter_data as files
import torch
from flamingo_peer import import_torchvision


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--otter", required=True, metavar="CHECKOUT")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    peer, masking = import_peer(os.path.abspath(args.otter))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files.write_files(folder)
        rows = {case: read(peer, masking, folder, case) for case in files.CASES}
        dataset = make(peer, folder, "image")
        pixels = dataset.process_images(["P"])[1][0].numpy()
    np.savez_compressed(args.out, rows=np.array(json.dumps(rows)), picture=pixels)
    print(args.out, os.path.getsize(args.out), {k: len(v) for k, v in rows.items()})


def import_peer(checkout):
    """Return the module of the dataset, and the function that makes labels."""
    import_torchvision()
    sys.modules["wandb"] = types.ModuleType("wandb")  # draws tables of the data
    sys.path.insert(0, checkout)
    printing = types.ModuleType("pipeline.train.train_utils")
    printing.master_print = printing.truncate_text = print
    sys.modules["pipeline.train.train_utils"] = printing
    from pipeline.mimicit_utils import mimicit_dataset

    script = os.path.join(checkout, "pipeline", "train", "instruction_following.py")
    with open(script) as file:
        tree = ast.parse(file.read())
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "masking"
    ]
    code = compile(ast.Module(found, []), script, "exec")
    return mimicit_dataset, code


def make(peer, folder, case):
    """Return the peer's dataset of a case."""
    group, _, _, related, symbols, _ = files.CASES[case]
    args = types.SimpleNamespace(
        tokenizer=files.tokenizer(),
        keep_symbols=symbols,
        seed=0,
        patch_image_size=files.SIDE,
        max_seq_len=512,
        instruction_format="simple",
        resample_frames=files.FRAMES,
        model_name="otter",
        populate_rel_ins=related,
        with_task_description=True,
        rank=1,
        report_to_wandb=False,
    )
    return peer.MimicitDataset(args, {case: files.paths(folder, case)}, group)


def read(peer, masking, folder, case):
    """Return the rows of a case."""
    dataset, rows = make(peer, folder, case), []
    for i in range(len(dataset)):
        batch = dataset.collate([dataset[i]])
        ids, images = batch["net_input"]["input_ids"], batch["net_input"]["patch_images"]
        means = images.double().mean((-2, -1))
        scale = torch.tensor(dataset.std), torch.tensor(dataset.mean)
        grey = (means * scale[0] + scale[1]) * 255
        rows.append(
            dict(
                id=batch["id"][0],
                tokens=ids[0].tolist(),
                labels=labels(masking, ids, dataset.tokenizer)[0].tolist(),
                shape=list(images.shape),
                colours=grey.mean(-1).round().int().flatten().tolist(),
            )
        )
    return rows


def labels(masking, ids, tokenizer):
    """Return the labels of a batch: the peer's function reads what surrounds it."""
    around = dict(
        torch=torch,
        input_ids=ids,
        device_id="cpu",
        args=types.SimpleNamespace(model_name="otter"),
        eos_token_id=tokenizer.eos_token_id,
        answer_token_id=tokenizer.convert_tokens_to_ids("<answer>"),
        endofchunk_token_id=tokenizer.convert_tokens_to_ids("<|endofchunk|>"),
    )
    exec(masking, around)
    return around["masking"]()


if __name__ == "__main__":
    main()
