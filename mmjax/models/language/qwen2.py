"""Qwen1.5 and Qwen2 (Bai et al. 2023): LLaMA with a bias in q, k and v."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language import llama
from mmjax.models.language.architecture import Architecture, refuse


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a Qwen2 config.json; windows in some of its layers are refused."""
    refuse(hf, use_sliding_window=False)
    plain = llama.read({**hf, "attention_bias": False, "mlp_bias": False})
    return dataclasses.replace(plain, qkv_bias=True)


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what a Qwen2 config.json says of a decoder."""
    return {
        **llama.sizes(c),
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "use_sliding_window": False,
    }


QWEN2 = Architecture(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    layers="model.layers",
    read=read,
    write=write,
    rules=llama.LLAMA.rules,
    marks=llama.LLAMA.marks,
)
