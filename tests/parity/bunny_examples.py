"""A golden batch of Bunny as examples, and models of its checkpoints."""

import json
import math

import numpy as np

import mmjax
from tests.parity import bunny_golden

IMAGE = -200


def load(golden, folder, **how):
    """Return a golden's model, its tower in files of its own whose sizes are told beside them."""
    path = bunny_golden.write_checkpoint(golden, folder, tower="beside", **how)
    return mmjax.load(path, vision_config=tower_json(golden, folder))


def tower_json(golden, folder):
    """Write what no tensor of so small a tower tells, and return the file."""
    file = folder / "tower.json"
    file.write_text(json.dumps(golden.tower_config))
    return file


def examples(case, n):
    """Return the rows of a case without padding, cut as the peer cuts them; n tokens an image."""
    limit = case.config["tokenizer_model_max_length"]
    rows = zip(case.ids, case.attention_mask, case.image_slots(), strict=True)
    return [
        {
            k: v if k == "patches" else v[:limit]
            for k, v in example(ids[mask], case.pixel_values[slots], n).items()
        }
        for ids, mask, slots in rows
    ]


def prompts(case, n):
    """Return what stands before the answers of a case."""
    rows = zip(case.ids, case.prompt_lengths, case.image_slots(), strict=True)
    return [example(ids[:k], case.pixel_values[slots], n) for ids, k, slots in rows]


def example(ids, pixels, n):
    """Return one row: ids with -200 where images stand, pixels f32[m,3,h,w]."""
    tokens, visual = [], []
    for token in ids:
        image = token == IMAGE
        tokens += [0] * n if image else [token]
        visual += [max(visual, default=-1) + 1] * n if image else [-1]
    count = len(tokens)
    return {
        "tokens": np.int32(tokens),
        "positions": np.arange(count, dtype=np.int32),
        "loss_mask": np.zeros(count, bool),
        "visual_index": np.int32(visual),
        "patches": pixels.transpose(0, 2, 3, 1).reshape(len(pixels), math.prod(pixels.shape[1:])),
    }


def targets(case, n):
    """Return the places of a case's targets in its rows, after the images are put in."""
    limit, found = case.config["tokenizer_model_max_length"], []
    for ids, mask, labels in zip(case.ids, case.attention_mask, case.labels, strict=True):
        spread = [
            label
            for token, label in zip(ids[mask], labels[mask], strict=True)
            for label in ([-100] * n if token == IMAGE else [label])
        ]
        at = np.flatnonzero(np.array(spread[:limit]) != -100)
        found.append(at[at > 0])  # nothing stands before a first token
    return found
