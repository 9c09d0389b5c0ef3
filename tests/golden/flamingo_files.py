"""The files people have of a Flamingo, written from the peer's model: what converters must read.

lm/              the language model's folder as on a hub, tokenizer included
tower.pt         open_clip's state dict of a whole CLIP, the tower in `visual.*`; towers/ its json
checkpoint.pt    the released form: what the peer's own filter keeps (trained parts, embeddings)
training.pt      the same inside {"epoch", "model_state_dict"}, names prefixed `module.`
instruct.pt      the instruct form: LoRA through peft, and a perceiver of its own; `module.` too
tuning.json      the adapters' settings; instruct.npz: inputs, logits and greedy_nocache with them
"""

import json
import os
import sys
import types

import flamingo_peer as peer
import numpy as np
import torch

# What the published instruct models adapt. `up_proj` and `down_proj` are no names of MosaicGPT.
TARGETS = ["Wqkv", "out_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS += ["to_q", "to_kv", "to_out", "ff.1", "ff.3"]
RANK, ALPHA = 4, 2


def write(lm, model, folder, arrays, greedy):
    """Write all files. It leaves adapters and another perceiver in the model, so it comes last.

    greedy: function (model, vision_x, ids, mask) -> ids with new tokens.
    """
    if lm == "mosaic1b":
        write_mosaic(os.path.join(folder, "lm"), model)
    torch.save(whole_clip(model), os.path.join(folder, "tower.pt"))
    released = released_state(lm, model)
    torch.save(released, os.path.join(folder, "checkpoint.pt"))
    torch.save(in_training(released), os.path.join(folder, "training.pt"))

    adapt(lm, model)
    trained = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    trained = peer.published_state(lm, trained)
    torch.save(in_training(trained), os.path.join(folder, "instruct.pt"))
    tuning = dict(lora=True, from_pretrained=False, lora_target_modules=targets(lm))
    tuning |= dict(lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, unfrozen=["perceiver"])
    with open(os.path.join(folder, "tuning.json"), "w") as f:
        json.dump(tuning, f, indent=1)
    inputs = {k: arrays[k] for k in ("vision_x", "input_ids", "attention_mask")}
    vision, ids, mask = map(torch.from_numpy, inputs.values())
    with torch.no_grad():
        logits = model(vision_x=vision, lang_x=ids, attention_mask=mask).logits
        texts = greedy(model, vision, ids, mask)
    outputs = dict(logits=logits.numpy(), greedy_nocache=texts.numpy())
    np.savez_compressed(os.path.join(folder, "instruct.npz"), **inputs, **outputs)


def compact_instruct(folder, out):
    """Write instruct.pt, its settings and outputs as one small file: int8 codes by name.

    It is an adapter of the model in the golden of the same language model and interval.
    """
    state = torch.load(os.path.join(folder, "instruct.pt"))["model_state_dict"]
    codes = {k: v.numpy() / peer.STEP for k, v in state.items()}
    for name, code in codes.items():
        if not np.array_equal(code, np.clip(np.rint(code), -127, 127)):
            raise ValueError(f"{name} is off the grid of {peer.STEP}")
    with open(os.path.join(folder, "tuning.json")) as f:
        tuning = np.array(f.read())
    with np.load(os.path.join(folder, "instruct.npz")) as file:
        outputs = {k: file[k] for k in ("logits", "greedy_nocache")}
    weights = {f"w8/{k}": v.astype(np.int8) for k, v in codes.items()}
    np.savez_compressed(out, tuning=tuning, **outputs, **weights)


def whole_clip(model):
    """Return open_clip's state dict of the model's tower beside a text tower nobody reads."""
    import open_clip

    clip = open_clip.create_model(peer.TOWER_NAME, pretrained=None)
    clip.visual.load_state_dict(model.vision_encoder.state_dict())
    return clip.state_dict()


def released_state(lm, model):
    """Return what the peer's filter keeps, under published names."""
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # imported there, used elsewhere
    from open_flamingo.train.train_utils import filter_state_dict_to_trainable

    state = dict(model.state_dict())
    head = state["lang_encoder.lm_head.weight"]
    state = filter_state_dict_to_trainable(model, state)
    if lm == "neox":  # the filter keeps what has "embed" in its name, as this head had then
        state["lang_encoder.lm_head.weight"] = head
    return {k: v.clone() for k, v in peer.published_state(lm, state).items()}


def in_training(state):
    """Return a state dict the way a distributed training run saves it."""
    return {"epoch": 3, "model_state_dict": {f"module.{k}": v for k, v in state.items()}}


def write_mosaic(folder, model):
    """Turn a folder of transformers' MPT into one of MosaicGPT, which transformers cannot make."""
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for i, block in enumerate(model.lang_encoder.old_decoder_blocks):
        for name in ("q_ln", "k_ln"):
            scale = getattr(block.attn, name).weight
            state[f"transformer.blocks.{i}.attn.{name}.weight"] = scale.detach().clone()
    torch.save(peer.published_state("mosaic1b", state), os.path.join(folder, "pytorch_model.bin"))
    os.remove(os.path.join(folder, "model.safetensors"))
    config = peer.published_config("mosaic1b", model.lang_encoder)
    config["vocab_size"] = peer.SPARE_ROWS
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1)


def adapt(lm, model):
    """Put LoRA into the language model and its cross-attention; give it another perceiver."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(5)
    model.requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets(lm), bias="none")
    model.lang_encoder = get_peft_model(model.lang_encoder, lora)
    with torch.no_grad():
        for p in model.lang_encoder.parameters():
            if p.requires_grad:
                p.copy_(peer.to_grid(torch.randn(p.shape, generator=generator) * 0.1))
    if lm == "mosaic1b":
        for block in model.lang_encoder.old_decoder_blocks:
            peer.normalise_qk(block.attn)  # behind the adapter now
    peer.fill(model.perceiver, generator)
    model.perceiver.requires_grad_(True)
    model.eval()


def targets(lm):
    """Return the module names to adapt."""
    return [name for name in TARGETS if lm != "mosaic1b" or name not in ("up_proj", "down_proj")]
