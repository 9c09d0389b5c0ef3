"""Load what mmjax writes of a Bunny into Bunny's own model, and compare its logits.

    PYTHONPATH=. python tests/golden/check_bunny_export.py --bunny CHECKOUT

CHECKOUT: as for make_bunny_goldens.py, in the same environment. Each committed model goes into a
folder of mmjax and out again, merged and as projector, a LoRA adapter of PEFT too; each is loaded
by bunny/model/builder.py, and answers the golden's first batch. Fails above 3e-6 of the largest
logit, for another machine's matmuls round otherwise; the adapter's is compared with that of the
adapter as PEFT saved it.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import bunny_loader
import bunny_peer as peer
import numpy as np
import torch
import transformers

from convert_weights import to_hf, to_jax
from tests.parity import bunny_examples, bunny_files, bunny_golden

LIMIT, EVA_OUT = 3e-6, peer.EVA_OUT


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bunny", required=True, metavar="CHECKOUT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peer.import_peer(os.path.abspath(args.bunny))
    for path in bunny_golden.paths():
        golden = bunny_golden.load(path)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            peer.write_tower(golden.tower)  # the one config.json names: not that of the golden
            check(golden, Path(folder))


def check(golden, folder):
    """Write a golden's model in each way and compare the peer's logits."""
    merged = bunny_golden.write_checkpoint(golden, folder)
    bunny_loader.write_tokenizer(merged)
    parts = ["--vision-config", str(bunny_examples.tower_json(golden, folder))]
    to_jax.main([str(merged), "jax", *parts])
    to_hf.main(["jax", "export"])
    want = golden.first.logits
    peer.EVA_OUT = 768  # of a head that mmjax writes as zeros
    compare(golden, "whole", answers(golden, "export"), want)
    peer.EVA_OUT = EVA_OUT
    # What is smaller takes the published tower, which is now that of the golden.
    published = Path(peer.TOWERS[golden.tower])
    shutil.rmtree(published) if published.is_dir() else published.unlink()
    bunny_golden.write_tower(golden, folder, prefix=False)
    to_hf.main(["jax", "projector", "--layout", "projector"])
    base = bunny_files.write_language_model(golden, folder / "lm")
    bunny_loader.write_tokenizer(base)
    compare(golden, "projector", answers(golden, "projector", base), want)
    if golden.language not in bunny_files.TARGETS:
        return
    lora = bunny_files.adapted(base, bunny_files.TARGETS[golden.language])
    bunny_files.write_adapter(golden, lora, folder / "lora", tower=True)
    to_hf.main(["lora", "lora-written", "--adapter", "--base", str(base), *parts])
    theirs, ours = (answers(golden, path, base) for path in ("lora", "lora-written"))
    assert np.abs(theirs - want).max() > 0.1  # it does something
    compare(golden, "adapter", ours, theirs)


def compare(golden, what, got, want):
    """Print the largest difference of logits at places that are filled; exit above the limit."""
    places = golden.first.row_mask()
    error = np.abs(got - want)[places].max() / np.abs(want[places]).max()
    print(f"{golden.name}, {what}: largest error {error:.1e}", flush=True)
    if not error <= LIMIT:
        raise SystemExit(f"logits differ by {error:.1e} of the largest; at most {LIMIT} is right")


def answers(golden, path, base=None):
    """Return the logits of a folder, loaded by the peer."""
    tokenizer, model = bunny_loader.load(golden.language, path, base)
    assert len(tokenizer) == golden.first.logits.shape[-1]
    return logits(golden, model)


def logits(golden, model):
    """Return what the peer makes of the golden's first batch."""
    case = golden.first
    arrays = (case.ids, case.attention_mask, case.pixel_values)
    ids, mask, images = (torch.from_numpy(np.array(x)) for x in arrays)
    with torch.no_grad():
        return model(ids, attention_mask=mask, images=images, use_cache=False).logits.numpy()


if __name__ == "__main__":
    main()
