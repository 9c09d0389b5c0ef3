"""A golden run of OpenFlamingo as a folder that mmjax loads, and its inputs as our examples."""

import json

import numpy as np
from safetensors.numpy import save_file

ARCHITECTURE = {"mosaic1b": "mosaic_gpt", "neox": "gpt_neox"}


def config_json(golden):
    """Return the config.json of a golden's model, in Otter's form."""
    tower, ids = golden.config["tower"], golden.config["ids"]
    name = ARCHITECTURE.get(golden.lm, golden.lm)
    return {
        "model_type": "flamingo",
        "cross_attn_every_n_layers": golden.every,
        "media_token_id": ids["image"],
        "eoc_token_id": ids["endofchunk"],
        "eos_token_id": ids["endofchunk"],  # where the peer's generate ends by default
        "text_config": {**golden.config["language"], "model_type": name},
        "vision_config": {
            "hidden_size": tower["width"],
            "num_hidden_layers": tower["layers"],
            "num_attention_heads": tower["width"] // tower["head_width"],
            "intermediate_size": 4 * tower["width"],
            "image_size": tower["image_size"],
            "patch_size": tower["patch_size"],
        },
    }


def write_folder(golden, folder):
    """Write the peer's whole state dict as a checkpoint folder."""
    folder.mkdir(parents=True)
    save_file({k: np.ascontiguousarray(v) for k, v in golden.weights.items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config_json(golden)))
    return folder


def example(ids, vision_x, media_token):
    """Return one prompt as our processor would make it. vision_x: [m, f, 3, H, W]."""
    ids = np.asarray(ids, np.int32)
    images = np.moveaxis(vision_x, 2, -1)
    return {
        "tokens": ids,
        "positions": np.arange(len(ids), dtype=np.int32),
        "loss_mask": np.zeros(len(ids), bool),
        "visual_index": (np.cumsum(ids == media_token) - 1).astype(np.int32),
        "patches": images.reshape(len(images), -1),
    }


def examples(golden):
    """Return the golden's left-padded prompts without their padding."""
    return [
        example(ids[mask > 0], images, golden.config["ids"]["image"])
        for ids, mask, images in zip(
            golden.input_ids, golden.attention_mask, golden.vision_x, strict=True
        )
    ]
