"""StableLM (Stability AI 2023): StableLM-3B-4E1T, StableLM-2-1.6B and Zephyr; LLaMA's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language import llama
from mmjax.models.language.architecture import Architecture, refuse


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a StableLM config.json, also in the words of ``stablelm_epoch``."""
    width = hf["hidden_size"] // hf["num_attention_heads"]
    refuse(hf, qk_layernorm=False, rotary_scaling_factor=1.0, head_dim=(None, width))
    return dataclasses.replace(
        llama.read({**hf, "attention_bias": False, "mlp_bias": False}, 0.25),
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", hf.get("norm_eps", 1e-5)),
        residual="shared" if hf.get("use_parallel_residual", False) else "sequential",
        residual_dropout=float(hf.get("hidden_dropout") or 0.0),
        residual_dropout_on="mlp",
        qkv_bias=bool(hf.get("use_qkv_bias", False)),
    )


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what a StableLM config.json says of a decoder, also to ``stablelm_epoch``."""
    return {
        **llama.sizes(c),
        "hidden_act": "silu",
        "layer_norm_eps": c.norm_eps,
        "norm_eps": c.norm_eps,
        "rope_pct": c.rope_fraction,
        "use_qkv_bias": c.qkv_bias,
        "use_parallel_residual": c.residual == "shared",
        "qk_layernorm": False,
        "hidden_dropout": c.residual_dropout,
    }


STABLELM = Architecture(
    model_type="stablelm",
    class_name="StableLmForCausalLM",
    layers="model.layers",
    read=read,
    write=write,
    rules=llama.LLAMA.rules,
    marks=("model.norm.bias",),
    aliases=("stablelm_epoch",),
)
