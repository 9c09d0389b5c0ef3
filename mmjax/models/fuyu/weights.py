"""Fuyu's published weights: one table of rules, and three ways of naming the same tensors.

``hub`` is the naming of adept/fuyu-8b, OtterHD-8B and what transformers saves; the table speaks it.
``transformers5`` is the naming inside transformers 5, ``megatron`` that of Adept's own release.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from mmjax.weights import tables
from mmjax.weights.operations import transpose
from mmjax.weights.reader import Reader
from mmjax.weights.rules import Rule

LAYOUTS = ("hub", "transformers5")
ADAPTER_LAYOUT = "transformers5"  # PEFT names modules as they stand in memory
_LAYER = "language_model.model.layers.{l}."
_QKV = f"{_LAYER}self_attn.query_key_value"


_TABLE: tuple[Rule, ...] = (
    Rule("decoder.embed.embedding", "language_model.model.embed_tokens.weight"),
    *tables.norm("decoder.layers.attn_norm", f"{_LAYER}input_layernorm"),
    *tables.fused_qkv("decoder.layers.attn", f"{_QKV}.weight", f"{_QKV}.bias", by_head=True),
    *tables.norm("decoder.layers.attn.q_norm", f"{_LAYER}self_attn.q_layernorm"),
    *tables.norm("decoder.layers.attn.k_norm", f"{_LAYER}self_attn.k_layernorm"),
    *tables.from_heads("decoder.layers.attn.o", f"{_LAYER}self_attn.dense"),
    *tables.norm("decoder.layers.mlp_norm", f"{_LAYER}post_attention_layernorm"),
    *tables.linear("decoder.layers.mlp.up", f"{_LAYER}mlp.dense_h_to_4h"),
    *tables.linear("decoder.layers.mlp.down", f"{_LAYER}mlp.dense_4h_to_h"),
    *tables.norm("decoder.final_norm", "language_model.model.final_layernorm"),
    Rule("decoder.head.kernel", "language_model.lm_head.weight", transpose),
    *tables.linear("patch_embed", "vision_embed_tokens"),
)


def rules(config: Any, layout: str = "hub") -> tuple[Rule, ...]:
    """Return the table of every Fuyu model, in the hub's names whatever the layout."""
    return _TABLE


IGNORE = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)image_patch_projection",
    r"^language_model\.lm_head\.weight$",
)
"""Tables of angles that old saves kept, a projection of Adept's that no model uses, and a tied head
that is written out beside the embedding."""

# (layout, mark that only its keys have, renames to the hub's names)
_LAYOUTS = (
    (
        "megatron",
        re.compile(
            r"^(language_model\.(encoder|embedding)\.|vit_encoder\."
            r"|(language_model\.)?word_embeddings_for_head\.)"
        ),
        (
            (re.compile(r"^language_model\.encoder\."), "language_model.model."),
            (
                re.compile(r"^(language_model\.)?word_embeddings_for_head\."),
                "language_model.lm_head.",
            ),
            (
                re.compile(r"^language_model\.embedding\.word_embeddings\."),
                "language_model.model.embed_tokens.",
            ),
            (re.compile(r"^vit_encoder\.linear_encoder\."), "vision_embed_tokens."),
            (re.compile(r"\.self_attention\."), ".self_attn."),
        ),
    ),
    (
        "transformers5",
        re.compile(r"^(model\.language_model\.|model\.vision_embed_tokens|lm_head)"),
        (
            (re.compile(r"^model\.language_model\."), "language_model.model."),
            (re.compile(r"^model\.vision_embed_tokens\b"), "vision_embed_tokens"),
            (re.compile(r"^lm_head\b"), "language_model.lm_head"),
        ),
    ),
    ("hub", re.compile(r"^(language_model\.(model|lm_head)|vision_embed_tokens)\b"), ()),
)
_TO_TRANSFORMERS5 = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^vision_embed_tokens\b"), "model.vision_embed_tokens"),
    (re.compile(r"^language_model\.lm_head\b"), "lm_head"),
)


def detect_layout(keys: Iterable[str]) -> str | None:
    """Tell ``megatron``, ``transformers5`` or ``hub`` from the keys; None if it is no Fuyu."""
    keys = list(keys)
    for layout, mark, _ in _LAYOUTS:
        if any(mark.search(key) for key in keys):
            return layout
    return None


def to_hub(key: str, layout: str) -> str:
    """Rename a key of a layout to the hub's name, which the table speaks."""
    renames = next(renames for name, _, renames in _LAYOUTS if name == layout)
    for pattern, new in renames:
        key = pattern.sub(new, key)
    return key


def from_hub(key: str, layout: str) -> str:
    """Rename a hub key for a layout that is written, ``hub`` or ``transformers5``."""
    if layout == "transformers5":
        for pattern, new in _TO_TRANSFORMERS5:
            key = pattern.sub(new, key)
    return key


def lora_target(kernel: str) -> str:
    """Return the name by which ``nn.LoRA.targets`` knows a kernel: ``attn.q``, ``mlp.up``."""
    return re.sub(r"^decoder\.(layers\.)?", "", kernel).removesuffix(".kernel")


def guess_config(reader: Reader) -> dict[str, Any]:
    """Read a model's sizes off its tensors (hub names), for a model without config.json."""
    keys = set(reader.keys())
    layers = 0
    while f"{_LAYER.replace('{l}', str(layers))}input_layernorm.weight" in keys:
        layers += 1
    hf: dict[str, Any] = {"model_type": "fuyu", "num_hidden_layers": layers}
    embed = "language_model.model.embed_tokens.weight"
    first = _LAYER.replace("{l}", "0")
    head, up = f"{first}self_attn.q_layernorm.weight", f"{first}mlp.dense_h_to_4h.weight"
    if embed in keys:
        hf["vocab_size"], hf["hidden_size"] = reader.shape(embed)
        if head in keys:
            hf["num_attention_heads"] = hf["hidden_size"] // reader.shape(head)[0]
    if up in keys:
        hf["intermediate_size"] = reader.shape(up)[0]
    if "vision_embed_tokens.weight" in keys:
        hf["patch_size"] = math.isqrt(reader.shape("vision_embed_tokens.weight")[1] // 3)
    return hf
