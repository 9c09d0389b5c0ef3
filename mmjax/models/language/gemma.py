"""Gemma (Gemma Team 2024), 1.0 and 1.1: LLaMA's names, wide heads, norms around 1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language import llama
from mmjax.models.language.architecture import Architecture, refuse

_TANH = "gelu_pytorch_tanh"


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a Gemma config.json; ``gelu`` there means its tanh form, too."""
    refuse(
        hf,
        hidden_act=("gelu", _TANH),
        hidden_activation=(None, _TANH),
        use_bidirectional_attention=(None, False),
    )
    stated = {"tie_word_embeddings": True, "head_dim": 256, **hf}
    plain = llama.read({**stated, "hidden_act": "silu", "mlp_bias": False})
    return dataclasses.replace(
        plain, activation="gelu_tanh", norm_plus_one=True, embed_scale=math.sqrt(plain.d_model)
    )


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what a Gemma config.json says of a decoder."""
    return {
        **llama.sizes(c),
        "hidden_act": _TANH,
        "hidden_activation": _TANH,
        "rms_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
    }


GEMMA = Architecture(
    model_type="gemma",
    class_name="GemmaForCausalLM",
    layers="model.layers",
    read=read,
    write=write,
    rules=llama.LLAMA.rules,
    marks=llama.LLAMA.marks,
)
