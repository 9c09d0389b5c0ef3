"""OPT (Zhang et al. 2022): learned positions, ReLU, the pre-norm sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language.architecture import Architecture, refuse
from mmjax.models.stated_sizes import head_width
from mmjax.types import MMJaxError
from mmjax.weights import tables
from mmjax.weights.operations import transpose
from mmjax.weights.rules import Rule

_LAYER = "model.decoder.layers.{l}."
_OFFSET = 2  # the table's first two rows are never looked at


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of an OPT config.json; OPT-350M, post-norm and projected, is refused."""
    refuse(
        hf,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
        activation_function=("relu", "gelu"),
    )
    heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
    if hf.get("word_embed_proj_dim", d_model) != d_model:
        raise MMJaxError(
            f"config.json says word_embed_proj_dim {hf['word_embed_proj_dim']} beside hidden_size "
            f"{d_model}; OPT models with projected embeddings (OPT-350M) are not supported"
        )
    bias = bool(hf.get("enable_bias", True))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_width(d_model, heads),
        d_mlp=hf["ffn_dim"],
        activation=hf.get("activation_function", "relu"),
        qk_norm="none",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        position="learned",
        position_offset=_OFFSET,
        max_positions=hf.get("max_position_embeddings", 2048),
        init_std=hf.get("init_std", 0.02),
        tied=bool(hf.get("tie_word_embeddings", True)),
        residual_dropout=float(hf.get("dropout") or 0.0),
    )


def write(c: DecoderConfig) -> dict[str, Any]:
    """Return what an OPT config.json says of a decoder."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "word_embed_proj_dim": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "ffn_dim": c.d_mlp,
        "activation_function": c.activation,
        "do_layer_norm_before": True,
        "enable_bias": c.qkv_bias,
        "max_position_embeddings": c.max_positions,
        "init_std": c.init_std,
        "tie_word_embeddings": c.tied,
        "dropout": c.residual_dropout,
    }


OPT = Architecture(
    model_type="opt",
    class_name="OPTForCausalLM",
    layers="model.decoder.layers",
    read=read,
    write=write,
    rules=(
        Rule("decoder.embed.embedding", "model.decoder.embed_tokens.weight"),
        Rule("decoder.position_embed.embedding", "model.decoder.embed_positions.weight"),
        *tables.norm("decoder.layers.attn_norm", f"{_LAYER}self_attn_layer_norm"),
        *tables.split_qkv("decoder.layers.attn", f"{_LAYER}self_attn"),
        *tables.from_heads("decoder.layers.attn.o", f"{_LAYER}self_attn.out_proj"),
        *tables.norm("decoder.layers.mlp_norm", f"{_LAYER}final_layer_norm"),
        *tables.linear("decoder.layers.mlp.up", f"{_LAYER}fc1"),
        *tables.linear("decoder.layers.mlp.down", f"{_LAYER}fc2"),
        *tables.norm("decoder.final_norm", "model.decoder.final_layer_norm"),
        Rule("decoder.head.kernel", "lm_head.weight", transpose),
    ),
    marks=("model.decoder.", "decoder.embed_positions."),
    ignore=(r"^lm_head\.weight$",),  # tied to the embedding; transformers may write it out
)
