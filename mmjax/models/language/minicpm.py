"""MiniCPM (Hu et al. 2024): LLaMA with scaled embeddings, residual branches and logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language import llama
from mmjax.models.language.architecture import Architecture


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a MiniCPM config.json; its head is tied where nothing is stated."""
    plain = llama.read({"tie_word_embeddings": True, **hf, "mlp_bias": False})
    return dataclasses.replace(
        plain,
        embed_scale=float(hf.get("scale_emb", 1)),
        residual_scale=hf.get("scale_depth", 1) / math.sqrt(plain.num_layers),
        logit_scale=hf.get("dim_model_base", 1) / plain.d_model,
    )


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what a MiniCPM config.json says of a decoder."""
    return {
        **llama.sizes(c),
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
        "scale_emb": c.embed_scale,
        "scale_depth": round(c.residual_scale * math.sqrt(c.num_layers), 12),
        "dim_model_base": round(c.logit_scale * c.d_model, 12),
    }


MINICPM = Architecture(
    model_type="minicpm",
    class_name="MiniCPMForCausalLM",
    layers="model.layers",
    read=read,
    write=write,
    rules=llama.LLAMA.rules,
    marks=llama.LLAMA.marks,
)
