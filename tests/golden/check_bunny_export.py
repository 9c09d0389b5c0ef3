"""Load what mmjax writes of a Bunny into Bunny's own model, and compare its logits.

    PYTHONPATH=. python tests/golden/check_bunny_export.py --bunny CHECKOUT

CHECKOUT: as for make_bunny_goldens.py, in the same environment. Each committed model goes into a
folder of mmjax and out again, merged and as projector, a LoRA adapter of PEFT too; each is loaded
as bunny/model/builder.py does, and answers the golden's first batch. Fails above 1e-6 of the
largest logit; the adapter's is compared with that of the adapter as PEFT saved it.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import bunny_peer as peer
import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from convert_weights import to_hf, to_jax
from tests.parity import bunny_examples, bunny_files, bunny_golden

LIMIT, EVA_OUT = 1e-6, peer.EVA_OUT
ROOT = "model.vision_tower."  # what the loader takes off


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
    parts = ["--vision-config", str(bunny_examples.tower_json(golden, folder))]
    to_jax.main([str(merged), "jax", *parts])
    to_hf.main(["jax", "export"])
    want = golden.first.logits
    compare(golden, "whole", logits(golden, whole(golden, Path("export"))), want)
    to_hf.main(["jax", "projector", "--layout", "projector"])
    base = bunny_files.write_language_model(golden, folder / "lm")
    model = from_base(golden, base, json.loads(Path("projector/config.json").read_text()))
    state = torch.load("projector/mm_projector.bin", weights_only=True)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    take_tower(model, golden.weights, strict=False)
    compare(golden, "projector", logits(golden, model), want)
    if golden.language not in bunny_files.TARGETS:
        return
    lora = bunny_files.adapted(base, bunny_files.TARGETS[golden.language])
    bunny_files.write_adapter(golden, lora, folder / "lora", tower=True)
    to_hf.main(["lora", "adapter", "--adapter", "--base", str(base), *parts])
    theirs, ours = (logits(golden, adapted(golden, base, Path(p))) for p in ("lora", "adapter"))
    assert np.abs(theirs - want).max() > 0.1  # it does something
    compare(golden, "adapter", ours, theirs)


def compare(golden, what, got, want):
    """Print the largest difference of logits at places that are filled; exit above the limit."""
    places = golden.first.row_mask()
    error = np.abs(got - want)[places].max() / np.abs(want[places]).max()
    print(f"{golden.name}, {what}: largest error {error:.1e}", flush=True)
    if not error <= LIMIT:
        raise SystemExit(f"logits differ by {error:.1e} of the largest; at most {LIMIT} is right")


def fresh(golden, config):
    """Return the peer's model of a config.json with random weights, its tower not loaded yet."""
    classes = peer.peer_classes(golden.language)
    settings = classes.config(**config)
    settings._attn_implementation = "eager"
    return classes.model(settings).eval()


def load(model, state):
    """Load what is no tower's, all of it."""
    rest = {k: v for k, v in state.items() if not k.startswith(ROOT)}
    report = model.load_state_dict(rest, strict=False)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    missing = [k for k in report.missing_keys if not k.startswith((ROOT, "model.mm_projector."))]
    missing = [k for k in missing if k != "lm_head.weight" or not model.config.tie_word_embeddings]
    unexpected = [k for k in report.unexpected_keys if k != "lm_head.bias"]
    assert not missing and not unexpected, (missing, unexpected)
    return model


def take_tower(model, state, *, strict):
    """Load the published tower, and over it the one of a checkpoint, as the peer's loader does."""
    tower = model.get_vision_tower()
    peer.EVA_OUT = 768 if strict else EVA_OUT  # of a head that mmjax writes as zeros
    tower.load_model()
    own = {k[len(ROOT) :]: torch.as_tensor(v) for k, v in state.items() if k.startswith(ROOT)}
    # Its transformers called the tensors as they are published; today's have dropped a level.
    names = {peer.published_name(ROOT + k)[len(ROOT) :]: k for k in tower.state_dict()}
    tower.load_state_dict({names.get(k, k): v for k, v in own.items()}, strict=strict)


def whole(golden, folder):
    """Load a folder that holds everything."""
    config, state = json.loads((folder / "config.json").read_text()), {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    model = load(fresh(golden, config), state)
    assert model.config.unfreeze_vision_tower
    take_tower(model, state, strict=True)
    return model.eval()


def from_base(golden, base, config):
    """Load the language model of a base under a Bunny's config."""
    return load(fresh(golden, config), load_file(base / "model.safetensors"))


def adapted(golden, base, folder):
    """Load an adapter and what lies beside it over a base, and merge it."""
    model = from_base(golden, base, json.loads((folder / "config.json").read_text()))
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    beside = {k.removeprefix("base_model.model."): v for k, v in beside.items()}
    model.load_state_dict(beside, strict=False)
    model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    take_tower(model, beside, strict=False)
    return model.eval()


def logits(golden, model):
    """Return what the peer makes of the golden's first batch."""
    case = golden.first
    arrays = (case.ids, case.attention_mask, case.pixel_values)
    ids, mask, images = (torch.from_numpy(np.array(x)) for x in arrays)
    with torch.no_grad():
        return model(ids, attention_mask=mask, images=images, use_cache=False).logits.numpy()


if __name__ == "__main__":
    main()
