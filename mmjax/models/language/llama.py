"""LLaMA (Touvron et al. 2023), and what shares its names: SmolLM2, Vicuna, Llama 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language.architecture import Architecture, refuse, rope_json, rope_of
from mmjax.weights import tables
from mmjax.weights.rules import Rule, transpose

_LAYER = "model.layers.{l}."


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a LLaMA config.json."""
    refuse(hf, hidden_act="silu")
    heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
    bias = bool(hf.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or d_model // heads,
        d_mlp=hf["intermediate_size"],
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qk_norm="none",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        max_positions=hf.get("max_position_embeddings", 2048),
        init_std=hf.get("initializer_range", 0.02),
        tied=bool(hf.get("tie_word_embeddings", False)),
        **rope_of(hf, 10_000.0),
    )


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what a LLaMA config.json says of a decoder."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_mlp,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "max_position_embeddings": c.max_positions,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        **rope_json(c),
    }


LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    layers="model.layers",
    read=read,
    write=write,
    rules=(
        Rule("decoder.embed.embedding", "model.embed_tokens.weight"),
        *tables.norm("decoder.layers.attn_norm", f"{_LAYER}input_layernorm"),
        *tables.to_heads("decoder.layers.attn.q", f"{_LAYER}self_attn.q_proj"),
        *tables.to_heads("decoder.layers.attn.k", f"{_LAYER}self_attn.k_proj"),
        *tables.to_heads("decoder.layers.attn.v", f"{_LAYER}self_attn.v_proj"),
        *tables.from_heads("decoder.layers.attn.o", f"{_LAYER}self_attn.o_proj"),
        *tables.norm("decoder.layers.mlp_norm", f"{_LAYER}post_attention_layernorm"),
        *tables.linear("decoder.layers.mlp.gate", f"{_LAYER}mlp.gate_proj"),
        *tables.linear("decoder.layers.mlp.up", f"{_LAYER}mlp.up_proj"),
        *tables.linear("decoder.layers.mlp.down", f"{_LAYER}mlp.down_proj"),
        *tables.norm("decoder.final_norm", "model.norm"),
        Rule("decoder.head.kernel", "lm_head.weight", transpose),
    ),
    marks=("model.layers.", "model.embed_tokens."),
    ignore=(r"rotary_emb\.inv_freq$",),
)
