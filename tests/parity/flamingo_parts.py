"""A golden run of OpenFlamingo as the files people have: language model, CLIP, trained part."""

import json
import re

import numpy as np
import torch
from safetensors.torch import save_file

from tests.parity import flamingo_peer

GATED = ".gated_cross_attn_layer."
TABLES = {  # with new rows and saved by the peer
    "mpt": ["transformer.wte.weight"],
    "mosaic1b": ["transformer.wte.weight"],
    "llama": ["model.embed_tokens.weight"],
    "neox": ["gpt_neox.embed_in.weight", "embed_out.weight"],
    "opt": ["model.decoder.embed_tokens.weight"],
}
SPARE = 272  # rows of a hub's table beyond the tokenizer


def tensors(state):
    return {k: torch.from_numpy(np.array(v)) for k, v in state.items()}


def trained_state(golden):
    """Return what OpenFlamingo's filter keeps: resampler, gated blocks, input embedding."""
    tables = {f"lang_encoder.{name}" for name in TABLES[golden.lm]}
    return {
        k: v
        for k, v in golden.weights.items()
        if k.startswith("perceiver.") or GATED in k or k in tables
    }


def write_language_model(golden, folder):
    """Write the language model as on a hub: its table has other rows, and no new tokens."""
    folder.mkdir(parents=True)
    state = {
        re.sub(r"\.(\d+)\.decoder_layer\.", r".\1.", k.removeprefix("lang_encoder.")): v
        for k, v in golden.weights.items()
        if k.startswith("lang_encoder.") and GATED not in k
    }
    first = golden.config["ids"]["endofchunk"]
    rows = first if golden.lm == "llama" else SPARE
    for name in TABLES[golden.lm]:
        state[name] = np.full((rows, state[name].shape[1]), 7.0, np.float32)
    if golden.lm == "llama":  # a head of its own, which OpenFlamingo does not save
        state["lm_head.weight"] = state["lm_head.weight"][:rows]
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    else:
        state.pop("lm_head.weight", None)
    save_file(tensors(state), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({**golden.config["language"], "vocab_size": rows})
    )
    return folder


def write_clip(golden, file):
    """Write open_clip's state dict of a whole CLIP, its text tower too, and its JSON."""
    visual = {
        "visual." + k.removeprefix("vision_encoder."): v
        for k, v in golden.weights.items()
        if k.startswith("vision_encoder.")
    }
    text = {
        "positional_embedding": np.ones((8, 16), np.float32),
        "transformer.resblocks.0.ln_1.weight": np.ones(16, np.float32),
        "token_embedding.weight": np.ones((64, 16), np.float32),
        "logit_scale": np.float32(4.6),
    }
    torch.save(tensors({**text, **visual}), file)
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": golden.config["tower"]}
    file.with_suffix(".json").write_text(json.dumps(config))
    return file


def write_hf_clip(golden, folder):
    """Write the tower as transformers' CLIPModel has it."""
    names = (
        (r"^class_embedding$", "embeddings.class_embedding"),
        (r"^positional_embedding$", "embeddings.position_embedding.weight"),
        (r"^conv1\.", "embeddings.patch_embedding."),
        (r"^ln_pre\.", "pre_layrnorm."),
        (r"^ln_post\.", "post_layernorm."),
        (r"^transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
        (r"\.ln_(\d)\.", r".layer_norm\1."),
        (r"\.attn\.", ".self_attn."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    )
    state = {"logit_scale": np.float32(4.6), "text_model.final_layer_norm.weight": np.ones(3)}
    for key, value in golden.weights.items():
        if not key.startswith("vision_encoder.") or key.endswith(".proj"):
            continue
        key = key.removeprefix("vision_encoder.")
        for pattern, new in names:
            key = re.sub(pattern, new, key)
        key = "vision_model." + key
        if ".in_proj_" in key:
            stem, kind = key.split("in_proj_")
            for name, part in zip("qkv", np.split(value, 3), strict=True):
                state[f"{stem}{name}_proj.{kind}"] = part
        else:
            state[key] = value
    folder.mkdir(parents=True)
    save_file(tensors(state), folder / "model.safetensors")
    vision = flamingo_peer.config_json(golden)["vision_config"] | {"hidden_act": "quick_gelu"}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    return folder


def write_parts(golden, folder):
    """Write all of it; returns the keyword arguments that name the parts."""
    ids = {f"{name}_token_id": golden.config["ids"][key] for name, key in
           (("media", "image"), ("eoc", "endofchunk"), ("eos", "endofchunk"))}  # fmt: skip
    lm = write_language_model(golden, folder / "lm")
    clip = write_clip(golden, folder / "clip.pt")
    torch.save(tensors(trained_state(golden)), folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps(ids))
    return {"lm": lm, "vision": clip, "vision_config": clip.with_suffix(".json")}
