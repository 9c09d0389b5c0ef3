"""LLaMA (Touvron et al. 2023), and what shares its names: SmolLM2, Vicuna, Llama 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language.architecture import Architecture, refuse, rope_json, rope_of
from mmjax.models.stated_sizes import head_width
from mmjax.weights import tables
from mmjax.weights.operations import transpose
from mmjax.weights.rules import Rule

LAYER = "model.layers.{l}."


def read(hf: Mapping[str, Any], fraction: float | None = None) -> DecoderConfig:
    """Return the decoder of a LLaMA config.json; fraction: see ``rope_of``."""
    refuse(hf, hidden_act="silu")
    heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
    bias = bool(hf.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or head_width(d_model, heads),
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
        **rope_of(hf, 10_000.0, fraction),
    )


def sizes(c: DecoderConfig) -> dict[str, Any]:
    """Return what config.json says of a decoder in the words that LLaMA's kin share."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_mlp,
        "max_position_embeddings": c.max_positions,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        **rope_json(c),
    }


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what a LLaMA config.json says of a decoder."""
    return {
        **sizes(c),
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
    }


def names(qkv: Sequence[Rule], gate_up: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return LLaMA's table around the rules of q, k, v and of an MLP's gate and up."""
    return (
        Rule("decoder.embed.embedding", "model.embed_tokens.weight"),
        *tables.norm("decoder.layers.attn_norm", f"{LAYER}input_layernorm"),
        *qkv,
        *tables.from_heads("decoder.layers.attn.o", f"{LAYER}self_attn.o_proj"),
        *tables.norm("decoder.layers.mlp_norm", f"{LAYER}post_attention_layernorm"),
        *gate_up,
        *tables.linear("decoder.layers.mlp.down", f"{LAYER}mlp.down_proj"),
        *tables.norm("decoder.final_norm", "model.norm"),
        Rule("decoder.head.kernel", "lm_head.weight", transpose),
    )


LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    layers="model.layers",
    read=read,
    write=write,
    rules=names(
        tables.split_qkv("decoder.layers.attn", f"{LAYER}self_attn"),
        (
            *tables.linear("decoder.layers.mlp.gate", f"{LAYER}mlp.gate_proj"),
            *tables.linear("decoder.layers.mlp.up", f"{LAYER}mlp.up_proj"),
        ),
    ),
    marks=("model.layers.", "model.embed_tokens."),
    ignore=(r"rotary_emb\.inv_freq$",),
)
