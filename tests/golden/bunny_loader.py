"""Bunny's own bunny/model/builder.py, as published, over bunny_peer.py, on a CPU.

Put back around it: weights are read in their own float32, where it asks for float16, so that sums
can be compared to the last bit; and from_pretrained, which today builds a model without numbers
and so loses the angles that the vendored classes compute in theirs, reads a folder plainly.
"""

import contextlib
import importlib
import json
import sys
import types
from pathlib import Path

import bunny_peer as peer
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

KINDS = {
    "phi": "phi-2",
    "stablelm": "stablelm-2",
    "qwen2": "qwen1.5-1.8b",
    "llama": "llama3-8b",
    "phi3": "phi-3",
    "minicpm": "minicpm",
}  # its word for each language model
ROOT = "model.vision_tower."
TOWERS = ("siglip.siglip_encoder.SiglipVisionTower", "clip.clip_encoder.CLIPVisionTower")
TOWERS += ("eva_clip.eva_clip_encoder.EvaClipVisionTower",)


def load(language, path, base=None):
    """Return (tokenizer, model) as load_pretrained_model makes them of a folder.

    A folder of an adapter has "lora" in its name, by which the peer knows it.
    """
    builder = prepare(language)
    with contextlib.redirect_stdout(None):
        tokenizer, model, _, _ = builder.load_pretrained_model(
            str(path), base and str(base), Path(path).name, KINDS[language], device="cpu"
        )
    return tokenizer, model.eval()


def prepare(language):
    """Return the builder's module, ready for a language model."""
    classes = peer.peer_classes(language)
    classes.model.from_pretrained = classmethod(plain_from_pretrained)
    # Today's PreTrainedModel has none; there it came with from_pretrained.
    classes.model.generation_config = transformers.GenerationConfig()
    for name in TOWERS:
        module, _, cls = name.rpartition(".")
        module = importlib.import_module(f"bunny.model.multimodal_encoder.{module}")
        getattr(module, cls).load_state_dict = load_tower
    setattr(sys.modules["bunny.model"], classes.model.__name__, classes.model)
    builder = importlib.import_module("bunny.model.builder")
    setattr(builder, classes.model.__name__, classes.model)
    builder.torch = InFloat32()
    return builder


class InFloat32(types.SimpleNamespace):
    """torch for the builder."""

    float16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def plain_from_pretrained(cls, folder, config=None, torch_dtype=None, **_):
    """Build a model and load what lies in a folder: all of it but tower and projector."""
    config = config or cls.config_class(**json.loads((Path(folder) / "config.json").read_text()))
    config._attn_implementation = "eager"
    model, state = cls(config).to(torch_dtype), {}
    for file in Path(folder).glob("*.safetensors"):
        state |= load_file(file)
    report = model.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith(ROOT)}, strict=False
    )
    tied = config.tie_word_embeddings
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    apart = (ROOT, "model.mm_projector.", *["lm_head.weight"] * tied)
    missing = [k for k in report.missing_keys if not k.startswith(apart)]
    unexpected = [k for k in report.unexpected_keys if k != "lm_head.bias"]  # Phi's own has one
    assert not missing and not unexpected, (missing, unexpected)
    return model


def load_tower(self, state, strict=True):
    """Load a tower's tensors as published: today's transformers has dropped a level of names."""
    names = {peer.published_name(ROOT + k)[len(ROOT) :]: k for k in self.state_dict()}
    renamed = {names.get(k, k): v for k, v in state.items()}
    return torch.nn.Module.load_state_dict(self, renamed, strict=strict)


def write_tokenizer(folder):
    """Write a tokenizer with a word for each row of the golden models.

    Among them are the special tokens that the classes of their tokenizers would add.
    """
    rows = peer.SIZES["vocab_size"]
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, rows - 1)), "<|endoftext|>"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=words[-1])
    tokenizer.save_pretrained(folder)
