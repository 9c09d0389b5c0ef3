"""GPT-NeoX (Black et al. 2022): RedPajama-INCITE and Pythia."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language.architecture import Architecture, refuse, rope_json, rope_of
from mmjax.models.stated_sizes import head_width
from mmjax.weights import tables
from mmjax.weights.operations import transpose
from mmjax.weights.rules import Rule

_LAYER = "gpt_neox.layers.{l}."
_QKV = f"{_LAYER}attention.query_key_value"
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a GPT-NeoX config.json."""
    heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
    refuse(hf, hidden_act=tuple(_ACTIVATIONS), head_dim=(None, d_model // heads))
    bias = bool(hf.get("attention_bias", True))
    parallel = hf.get("use_parallel_residual", True)
    dropout = float(hf.get("hidden_dropout") or 0.0)
    # At the top transformers reads rotary_emb_base and rotary_pct, and no others' words.
    rotation = {key: hf[key] for key in hf.keys() - {"rope_theta", "partial_rotary_factor"}}
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_width(d_model, heads),
        d_mlp=hf["intermediate_size"],
        activation=_ACTIVATIONS[hf.get("hidden_act", "gelu")],
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        qk_norm="none",
        residual="parallel" if parallel else "sequential",
        qkv_bias=bias,
        out_bias=bias,
        max_positions=hf.get("max_position_embeddings", 2048),
        init_std=hf.get("initializer_range", 0.02),
        tied=bool(hf.get("tie_word_embeddings", False)),
        residual_dropout=dropout,
        embedding_dropout=dropout,
        **rope_of(rotation, 10_000.0, 0.25),
    )


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what a GPT-NeoX config.json says of a decoder."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.d_mlp,
        "hidden_act": "gelu" if c.activation == "gelu" else "gelu_new",
        "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.residual == "parallel",
        "attention_bias": c.qkv_bias,
        "max_position_embeddings": c.max_positions,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        "hidden_dropout": c.residual_dropout,
        "rotary_pct": c.rope_fraction,
        "rotary_emb_base": c.rope_theta,
        **rope_json(c),
    }


NEOX = Architecture(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    layers="gpt_neox.layers",
    read=read,
    write=write,
    rules=(
        Rule("decoder.embed.embedding", "gpt_neox.embed_in.weight"),
        *tables.norm("decoder.layers.attn_norm", f"{_LAYER}input_layernorm"),
        *tables.fused_qkv("decoder.layers.attn", f"{_QKV}.weight", f"{_QKV}.bias", by_head=True),
        *tables.from_heads("decoder.layers.attn.o", f"{_LAYER}attention.dense"),
        *tables.norm("decoder.layers.mlp_norm", f"{_LAYER}post_attention_layernorm"),
        *tables.linear("decoder.layers.mlp.up", f"{_LAYER}mlp.dense_h_to_4h"),
        *tables.linear("decoder.layers.mlp.down", f"{_LAYER}mlp.dense_4h_to_h"),
        *tables.norm("decoder.final_norm", "gpt_neox.final_layer_norm"),
        Rule("decoder.head.kernel", "embed_out.weight", transpose),
    ),
    marks=("gpt_neox.",),
    # Tables of angles and masks that old saves kept.
    ignore=(r"rotary_emb\.inv_freq$", r"attention\.(masked_)?bias$"),
)
