"""The files people have of a golden Bunny's parts: language model, projector, tower, adapter."""

import json
import re

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.parity import bunny_examples, bunny_golden
from tests.parity.bunny_golden import TOWER
from tests.parity.parameters import assert_same, read_all

PROJECTOR = "model.mm_projector."
# transformers' words for what StableLM's own code called otherwise.
WORDS = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
OWN = re.compile(  # what Bunny adds to a language model's config.json
    r"^(use_)?mm_|_mm_mlp_adapter$|^unfreeze_|^(use_)?s2|^image_|^tokenizer_|^architectures$"
)
LORA = dict(r=8, lora_alpha=16, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
TARGETS = {
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "stablelm": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # all linear maps but the head, as the peer finds them


def tensors(state):
    return {k: torch.from_numpy(np.array(v)) for k, v in state.items()}


def part(golden, prefix):
    """Return the weights whose names begin so."""
    return {k: v for k, v in golden.weights.items() if k.startswith(prefix)}


def language_state(golden):
    """Return the weights of the language model, under its own names."""
    return {k: v for k, v in golden.weights.items() if not k.startswith((PROJECTOR, TOWER))}


def language_config(golden):
    """Return the language model's config.json, before it was a Bunny's."""
    config = {WORDS.get(k, k): v for k, v in golden.config.items() if not OWN.search(k)}
    return config | {"model_type": golden.config["model_type"].removeprefix("bunny-")}


def write(state, folder, config=None, file="model.safetensors"):
    """Write tensors into a file of either format, with a config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file(tensors(state), folder / file)
    else:
        torch.save(tensors(state), folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_language_model(golden, folder, *, bias=0.0, **changes):
    """Write the language model as on a hub; Phi's head has a bias, which Bunny leaves out."""
    state = language_state(golden)
    if golden.language == "phi":
        state["lm_head.bias"] = np.full(len(state["lm_head.weight"]), bias, np.float32)
    return write(state, folder, language_config(golden) | changes)


def fused(state):
    """Return Phi's weights as its first files hold them: q, k and v of a head one by one."""
    out = {}
    for key, value in state.items():
        mine = key.startswith("model.layers.")  # the tower's stay apart
        if mine and ".self_attn.q_proj." in key:
            parts = [state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            heads = [part.reshape(4, 8, *part.shape[1:]) for part in parts]
            key = key.replace("q_proj", "query_key_value")
            out[key] = np.stack(heads, 1).reshape(3 * len(value), *value.shape[1:])
        elif not (mine and re.search(r"self_attn\.[kv]_proj", key)):
            out[key] = value
    return out


def open_clip(golden):
    """Return a golden CLIP as open_clip's state dict of a whole CLIP has it."""
    names = (
        (r"^embeddings\.class_embedding$", "class_embedding"),
        (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
        (r"^embeddings\.patch_embedding\.", "conv1."),
        (r"^pre_layrnorm\.", "ln_pre."),
        (r"^post_layernorm\.", "ln_post."),
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"\.layer_norm(\d)\.", r".ln_\1."),
        (r"\.self_attn\.out_proj", ".attn.out_proj"),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    )
    out, tower = {"logit_scale": np.float32(4.6)}, part(golden, TOWER)
    for key, value in tower.items():
        if re.search(r"self_attn\.[kv]_proj", key):
            continue
        if ".self_attn.q_proj." in key:
            value = np.concatenate([tower[key.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
        key = key.removeprefix(f"{TOWER}vision_model.")
        for pattern, new in names:
            key = re.sub(pattern, new, key)
        out[f"visual.{key}"] = value
    return out


def adapted(folder, targets):
    """Return transformers' language model in a folder with an adapter of PEFT, as if trained."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape))
    return model.eval()


def write_adapter(golden, model, folder, *, tower=False, safe=True, **changes):
    """Write a folder as the peer's LoRA training leaves it: neither base nor tokenizer.

    tower: it was unfrozen, and is saved with the projector.
    """
    model.save_pretrained(folder, safe_serialization=safe)
    beside = part(golden, (PROJECTOR, TOWER) if tower else PROJECTOR)
    beside = {f"base_model.model.{k}": v for k, v in beside.items()}
    config = golden.config | {"unfreeze_vision_tower": tower} | changes
    return write(beside, folder, config, "non_lora_trainables.bin")


class Files:
    """A golden, the folder of its merged model, and the parameters in that."""

    def __init__(self, name, folder):
        self.golden = bunny_golden.load(bunny_golden.COMMITTED / f"bunny_{name}.npz")
        self.folder = folder
        self.merged = bunny_golden.write_checkpoint(self.golden, folder)
        self.sizes = bunny_examples.tower_json(self.golden, folder)
        self.tower = bunny_golden.write_tower(self.golden, folder)
        self.lm = write_language_model(self.golden, folder / "lm", bias=3.0)
        self.opened, self.params = read_all(self.merged, vision_config=self.sizes)

    @property
    def parts(self):
        """Keywords that name what stage 1 and adapters leave out."""
        return {"lm": self.lm, "vision": self.tower, "vision_config": self.sizes}

    def same(self, path, **parts):
        """Fail unless a checkpoint is this model."""
        opened, params = read_all(path, **parts)
        assert opened.config == self.opened.config
        assert_same(params, self.params)
