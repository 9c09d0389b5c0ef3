"""The bunny suite: train steps of stage 2, and generation. numpy alone, both sides read it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import cases
from bench.cases import BunnySize, Case

TINY = BunnySize(
    vocab=512, d=64, layers=2, heads=4, mlp=128, image=28, tower_d=64, tower_layers=2,
    tower_heads=2, rank=4,
)  # fmt: skip
TRAINED = {
    "all": {"lr": 2e-5, "projector_lr": 2e-5},
    "lora": {"lr": 2e-4, "projector_lr": 2e-5},
}
"""The two second stages of Bunny's scripts: the language model whole, or adapters on it.

The projector is trained in both, the tower in neither; no weight decay.
"""
ALPHA = 2  # times the rank, as in Bunny's script
SDPA, GATHERED = "sdpa", "sdpa, gathered logits"
COMPILED = f"{GATHERED}, compiled layers"
TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense",
           "mlp.fc1", "mlp.fc2")  # fmt: skip
PROJECTOR, TOWER = "model.mm_projector.", "model.vision_tower.vision_tower."
"""What stands before the names of tensors in a merged model."""


def bunny_cases(quick: bool, device: str) -> list[Case]:
    """Return the cases of the bunny suite; they run on the CPU."""
    size, found = TINY if quick else BunnySize(), []
    b, t = (2, 48) if quick else (4, 256)
    for trained, name in (("all", "language model and projector"), ("lora", "adapters")):
        options = {"kind": "train", "b": b, "t": t, "trained": trained}
        found.append(
            Case(
                "bunny",
                f"train step of {name}, batch {b}, up to {t} tokens",
                options,
                work=sum(lengths(b, t)),
                unit="tokens",
                bound=1e-4,
                size=size,
                peers=(SDPA, GATHERED) if quick else (SDPA, GATHERED, COMPILED),
                target=1.2,
            )
        )
    new = 8 if quick else 64
    for b in [2] if quick else [1, 4]:
        found.append(
            Case(
                "bunny",
                f"generation, batch {b}, an image each, {new} new tokens",
                {"kind": "generate", "b": b, "new": new, "t": 24 if quick else 120},
                work=b * new,
                unit="tokens",
                bound=0,  # the same tokens
                size=size,
                peers=(SDPA,),
                target=3.0,
            )
        )
    return found


def lengths(b: int, t: int) -> list[int]:
    """Return the tokens of each row of a batch, from t down to little more than half of it."""
    return [t - row * t // (2 * b) for row in range(b)]


def config_json(size: BunnySize) -> dict[str, Any]:
    """Return the config.json of a Bunny on a Phi, with the tower's sizes in it."""
    return {
        "model_type": "bunny-phi",
        "architectures": ["BunnyPhiForCausalLM"],
        **phi_config(size),
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": size.tower_d,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": size.positions,
        "vision_config": siglip_config(size),
    }


def phi_config(size: BunnySize) -> dict[str, Any]:
    """Return the sizes of the language model, in the words of PhiConfig."""
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.d,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.positions,
        "partial_rotary_factor": 0.5,
        "bos_token_id": cases.EOS,
        "eos_token_id": cases.EOS,
    }


def siglip_config(size: BunnySize) -> dict[str, Any]:
    """Return the sizes of the tower, in the words of SiglipVisionConfig."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": size.tower_d,
        "intermediate_size": 4 * size.tower_d,
        "num_hidden_layers": size.tower_layers,
        "num_attention_heads": size.tower_heads,
        "image_size": size.image,
        "patch_size": size.patch,
        "vision_use_head": False,
    }


def write_model(size: BunnySize, folder: str) -> None:
    """Write a random model as Bunny's merge script does, and an adapter of it in ``lora``.

    Every tensor is at work, biases and norms too, and the adapter's second half. The head's row of
    the end token is zero: a greedy answer never ends early, so every run generates as many tokens.
    """
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {name: _drawn(rng, name, shape) for name, shape in shapes(size)}
    tensors["lm_head.weight"][cases.EOS] = 0
    adapter = {name: _drawn(rng, name, shape) for name, shape in adapter_shapes(size)}
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(folder),
        "r": size.rank,
        "lora_alpha": ALPHA * size.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in TARGETS],
    }
    inner = os.path.join(folder, "lora")
    os.makedirs(inner)
    save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    save_file(adapter, os.path.join(inner, "adapter_model.safetensors"), {"format": "pt"})
    for name, data in ((folder, config_json(size)), (inner, about)):
        file = "config.json" if name == folder else "adapter_config.json"
        with open(os.path.join(name, file), "w") as out:
            json.dump(data, out)


def shapes(size: BunnySize) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of a merged model on a Phi."""

    def linear(name: str, d_in: int, d_out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (d_out, d_in)
        yield f"{name}.bias", (d_out,)

    def norm(name: str, d: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (d,)
        yield f"{name}.bias", (d,)

    d = size.d
    yield "model.embed_tokens.weight", (size.vocab, d)
    for i in range(size.layers):
        root = f"model.layers.{i}."
        yield from norm(f"{root}input_layernorm", d)
        for name in TARGETS:
            yield from linear(root + name, *_widths(size, name))
    yield from norm("model.final_layernorm", d)
    yield "lm_head.weight", (size.vocab, d)  # Bunny's has no bias
    d, root = size.tower_d, f"{TOWER}vision_model."
    yield f"{root}embeddings.patch_embedding.weight", (d, 3, size.patch, size.patch)
    yield f"{root}embeddings.patch_embedding.bias", (d,)
    yield f"{root}embeddings.position_embedding.weight", (size.image_tokens, d)
    for i in range(size.tower_layers):
        layer = f"{root}encoder.layers.{i}."
        for name in ("layer_norm1", "layer_norm2"):
            yield from norm(layer + name, d)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}self_attn.{name}", d, d)
        yield from linear(f"{layer}mlp.fc1", d, 4 * d)
        yield from linear(f"{layer}mlp.fc2", 4 * d, d)
    yield from norm(f"{root}post_layernorm", d)
    yield from linear(f"{PROJECTOR}0", d, size.d)
    yield from linear(f"{PROJECTOR}2", size.d, size.d)


def adapter_shapes(size: BunnySize) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of an adapter, in PEFT's names."""
    for i in range(size.layers):
        for name in TARGETS:
            d_in, d_out = _widths(size, name)
            root = f"base_model.model.model.layers.{i}.{name}"
            yield f"{root}.lora_A.weight", (size.rank, d_in)
            yield f"{root}.lora_B.weight", (d_out, size.rank)


def _widths(size: BunnySize, name: str) -> tuple[int, int]:
    """Return input and output width of a linear map of the language model."""
    return {"mlp.fc1": (size.d, size.mlp), "mlp.fc2": (size.mlp, size.d)}.get(
        name, (size.d, size.d)
    )


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32)
    if "lora_B" in name:
        noise *= 0.02  # an adapter is a small change
    elif "embed" in name and len(shape) == 2:
        noise *= 0.5
    elif len(shape) > 1:
        noise *= np.prod(shape[1:]) ** -0.5
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            noise *= 2  # attention that chooses: answers otherwise go round in small circles
    elif name.endswith("weight"):
        noise = 1 + 0.2 * noise
    else:
        noise *= 0.1
    return noise.astype(np.float32)


def train_batch(case: Case) -> dict[str, np.ndarray]:
    """Make a batch of ``mmjax.types.Batch``: rows of an image, questions and answers.

    Rows differ in length and are padded on the right. Targets are the answers: three fifths of the
    text behind the image.
    """
    b, t = case.options["b"], case.options["t"]
    rng, size = np.random.default_rng(0), case.size
    tokens = np.zeros((b, t), np.int32)
    visual = np.full((b, t), -1, np.int32)
    segments = np.zeros((b, t), np.int32)
    targets = []
    for row, length in enumerate(lengths(b, t)):
        tokens[row, :length], visual[row, :length] = _stream(rng, size, length)
        segments[row, :length] = 1
        first, rounds = int(np.flatnonzero(visual[row] >= 0)[-1]) + 1, 1 + row % 2
        share = (length - first) // rounds
        ends = [length - i * share for i in reversed(range(rounds))]
        targets.append(np.concatenate([np.arange(e - share * 3 // 5, e) for e in ends]))
    index = np.full((b, max(map(len, targets))), -1, np.int32)
    for row, some in enumerate(targets):
        index[row, : len(some)] = some
    return {
        "tokens": tokens,
        "positions": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "visual_index": visual,
        "segment_ids": segments,
        "patches": rng.integers(0, 256, (b, 1, size.image**2 * 3), np.uint8),
        "target_index": index,
    }


def prompts(case: Case) -> list[dict[str, np.ndarray]]:
    """Make prompts as a processor would: an image among text, each row with its own length."""
    b, t = case.options["b"], case.options["t"]
    rng, size = np.random.default_rng(1), case.size
    found = []
    for row in range(b):
        length = t - 5 * row
        tokens, visual = _stream(rng, size, length)
        found.append(
            {
                "tokens": tokens,
                "positions": np.arange(length, dtype=np.int32),
                "loss_mask": np.zeros(length, bool),
                "visual_index": visual,
                "patches": rng.integers(0, 256, (1, size.image**2 * 3), np.uint8),
            }
        )
    return found


def _stream(
    rng: np.random.Generator, size: BunnySize, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a text with an image near its front: token ids and ``visual_index``, int32[length]."""
    tokens = cases.text(rng, size, (length,))
    visual = np.full(length, -1, np.int32)
    first = int(rng.integers(3, 9))
    visual[first : first + size.image_tokens] = 0
    tokens[visual >= 0] = 0
    return tokens, visual
