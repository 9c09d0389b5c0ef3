"""Phi (Gunasekar et al. 2023): phi-1, phi-1.5 and phi-2, one norm for attention and MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language.architecture import Architecture, refuse, rope_json, rope_of
from mmjax.models.stated_sizes import head_width
from mmjax.weights import tables
from mmjax.weights.rules import Rule

_LAYER = "model.layers.{l}."
_QKV = f"{_LAYER}self_attn.query_key_value"


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a Phi config.json.

    ``lm_head_bias`` false means a head without bias, which Bunny makes of it; Phi itself never
    states it and has one.
    """
    refuse(hf, hidden_act="gelu_new", qk_layernorm=False)
    head_bias = bool(hf.get("lm_head_bias", True))
    if head_bias:  # which a table has not
        refuse(hf, tie_word_embeddings=(False, None))
    heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
    refuse(hf, head_dim=(None, d_model // heads))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_width(d_model, heads),
        d_mlp=hf["intermediate_size"],
        activation="gelu_tanh",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        qk_norm="none",
        residual="shared",
        residual_dropout=float(hf.get("resid_pdrop") or 0.0),
        embedding_dropout=float(hf.get("embd_pdrop") or 0.0),
        max_positions=hf.get("max_position_embeddings", 2048),
        init_std=hf.get("initializer_range", 0.02),
        tied=bool(hf.get("tie_word_embeddings", False)),
        head_bias=head_bias,
        **rope_of(hf, 10_000.0, 0.5),
    )


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what a Phi config.json says of a decoder.

    transformers gives a head without bias one of zeros, which is the same.
    """
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "intermediate_size": c.d_mlp,
        "hidden_act": "gelu_new",
        "layer_norm_eps": c.norm_eps,
        "qk_layernorm": False,
        "max_position_embeddings": c.max_positions,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        "lm_head_bias": c.head_bias,
        "resid_pdrop": c.residual_dropout,
        "embd_pdrop": c.embedding_dropout,
        **rope_json(c),
    }


def _rules(qkv: Sequence[Rule]) -> tuple[Rule, ...]:
    return (
        Rule("decoder.embed.embedding", "model.embed_tokens.weight"),
        *tables.norm("decoder.layers.attn_norm", f"{_LAYER}input_layernorm"),
        *qkv,
        *tables.from_heads("decoder.layers.attn.o", f"{_LAYER}self_attn.dense"),
        *tables.linear("decoder.layers.mlp.up", f"{_LAYER}mlp.fc1"),
        *tables.linear("decoder.layers.mlp.down", f"{_LAYER}mlp.fc2"),
        *tables.norm("decoder.final_norm", "model.final_layernorm"),
        *tables.linear("decoder.head", "lm_head"),
    )


PHI = Architecture(
    model_type="phi",
    class_name="PhiForCausalLM",
    layers="model.layers",
    read=read,
    write=write,
    rules=_rules(tables.split_qkv("decoder.layers.attn", f"{_LAYER}self_attn")),
    # Hugging Face's first Phi, of January 2024: phi-1_5_dev and phi-2_dev, which Bunny began with.
    fused=_rules(
        tables.fused_qkv("decoder.layers.attn", f"{_QKV}.weight", f"{_QKV}.bias", by_head=True)
    ),
    marks=("model.final_layernorm.",),
)
