"""Read what Otter's own code made (tests/golden/make_otter_goldens.py says how)."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.parity import flamingo_golden, flamingo_peer

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from drawn_weights import draw_all  # noqa: E402
from flamingo_peer import byte_tokenizer  # noqa: E402


def load(lm):
    """Return the Golden of a language model, its weights drawn anew."""
    folder = Path(os.environ.get("OTTER_GOLDENS", GOLDEN))
    golden = flamingo_golden.load(folder / f"otter_{lm}.npz")
    weights = draw_all(golden.config["shapes"], golden.config["seed"])
    return dataclasses.replace(golden, weights=weights)


def tokenizer():
    """Return the peer's tokenizer: bytes, and the tokens that Otter adds."""
    made = byte_tokenizer(with_pad=False)
    made.add_special_tokens({"extra_special_tokens": ["<|endofchunk|>", "<image>", "<answer>"]})
    made.add_special_tokens({"pad_token": "<PAD>"})
    return made


def write_folder(golden, folder):
    """Write what the peer's save_pretrained writes, and its tokenizer beside it."""
    folder.mkdir(parents=True)
    save_file(golden.weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(golden.config["config"]))
    tokenizer().save_pretrained(folder)
    return folder


def examples(golden):
    """Return the golden's left-padded prompts without their padding; a medium is all its frames."""
    image, made = golden.config["ids"]["image"], []
    rows = zip(golden.input_ids, golden.attention_mask, golden.vision_x, strict=True)
    for ids, mask, media in rows:
        one = flamingo_peer.example(ids[mask > 0], media[:, 0], image)
        frames = np.moveaxis(media, -3, -1)  # [m, f, h, w, 3]
        made.append({**one, "patches": frames.reshape(len(frames), -1)})
    return made
