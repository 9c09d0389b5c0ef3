"""MPT (MosaicML 2023): MPT-7B in transformers' names, and MPT-1B as MosaicGPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.language.architecture import Architecture, refuse
from mmjax.models.stated_sizes import head_width, without_nulls
from mmjax.weights import tables
from mmjax.weights.rules import Rule

_BLOCK = "transformer.blocks.{l}."


def _decoder(hf: Mapping[str, Any], *, expansion: float, qk_norm: bool, clip, max_bias):
    """Return the decoder that both kinds of config.json describe with the same words."""
    refuse(
        hf, no_bias=True, logit_scale=None, embedding_fraction=1.0, tie_word_embeddings=True,
        norm_type=("layernorm", "low_precision_layernorm"),
    )  # fmt: skip
    heads, d_model = hf["n_heads"], hf["d_model"]
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        num_layers=hf["n_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_width(d_model, heads),
        d_mlp=int(expansion * d_model),
        activation="gelu",
        norm_bias=False,
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        qk_norm="model" if qk_norm else "none",
        clip_qkv=clip or None,  # 0 is no bound to the peers either
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        position="alibi",
        alibi_max=float(max_bias),
        max_positions=hf.get("max_seq_len", 2048),
        init_std=hf.get("initializer_range", 0.02),
        tied=True,
        # As MosaicML's code; transformers' drops by attn_pdrop there, and reads neither of these.
        residual_dropout=float(hf.get("resid_pdrop") or 0.0),
        embedding_dropout=float(hf.get("emb_pdrop") or 0.0),
    )


def _sizes(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "d_model": c.d_model,
        "n_layers": c.num_layers,
        "n_heads": c.num_heads,
        "max_seq_len": c.max_positions,
        "no_bias": True,
        "logit_scale": None,
        "tie_word_embeddings": True,
        "resid_pdrop": c.residual_dropout,
        "emb_pdrop": c.embedding_dropout,
    }


def _ratio(c: DecoderConfig) -> int | float:
    """Return the MLP's width over the model's, a whole number as published where it is one."""
    return c.d_mlp / c.d_model if c.d_mlp % c.d_model else c.d_mlp // c.d_model


def read_mpt(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of MPT's config.json.

    ``attn_config.qk_ln`` and ``alibi_bias_max`` are obeyed; transformers' modeling_mpt.py reads
    neither: it has no query and key norms, and its steepest slope is always that of 8.
    """
    own = without_nulls(hf.get("attn_config") or {})
    attn = {**hf, **own, "model_type": hf.get("model_type")}
    refuse(
        attn, alibi=True, rope=False, attn_type="multihead_attention", prefix_lm=False,
        softmax_scale=None, sliding_window_size=-1,
    )  # fmt: skip
    refuse({**hf, **(hf.get("ffn_config") or {})}, ffn_type="mptmlp")
    return _decoder(
        hf,
        expansion=hf.get("expansion_ratio", 4),
        qk_norm=bool(attn.get("qk_ln", False)),
        clip=attn.get("clip_qkv"),
        max_bias=attn.get("alibi_bias_max", 8),
    )


def write_mpt(c: DecoderConfig) -> dict[str, Any]:
    """Return what MPT's config.json says of a decoder."""
    return {
        **_sizes(c),
        "expansion_ratio": _ratio(c),
        "layer_norm_epsilon": c.norm_eps,
        "norm_type": "low_precision_layernorm",
        "initializer_range": c.init_std,
        "attn_config": {
            "attn_type": "multihead_attention",
            "alibi": True,
            "alibi_bias_max": int(c.alibi_max),
            "qk_ln": c.qk_norm == "model",
            "clip_qkv": c.clip_qkv,
        },
    }


def read_mosaic(hf: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of MosaicGPT's config.json (MPT-1B)."""
    refuse(hf, alibi=True, softmax_scale=None)
    return _decoder(
        hf,
        expansion=hf.get("mlp_ratio", 4),
        qk_norm=bool(hf.get("attn_qk_ln", False)),
        clip=hf.get("attn_clip_qkv"),
        max_bias=hf.get("alibi_bias_max", 8),
    )


def write_mosaic(c: DecoderConfig) -> dict[str, Any]:
    """Return what MosaicGPT's config.json says of a decoder."""
    return {
        **_sizes(c),
        "mlp_ratio": _ratio(c),
        "alibi": True,
        "alibi_bias_max": int(c.alibi_max),
        "attn_qk_ln": c.qk_norm == "model",
        "attn_clip_qkv": c.clip_qkv,
        "low_precision_layernorm": True,
    }


def _rules(norm: str, up: str, down: str, final: str) -> tuple[Rule, ...]:
    """Return the table; the two kinds name their norms and MLP differently."""
    return (
        Rule("decoder.embed.embedding", "transformer.wte.weight"),
        *tables.norm("decoder.layers.attn_norm", f"{_BLOCK}{norm}_1"),
        *tables.fused_qkv("decoder.layers.attn", f"{_BLOCK}attn.Wqkv.weight", by_head=False),
        *tables.norm("decoder.layers.attn.q_norm", f"{_BLOCK}attn.q_ln"),
        *tables.norm("decoder.layers.attn.k_norm", f"{_BLOCK}attn.k_ln"),
        *tables.from_heads("decoder.layers.attn.o", f"{_BLOCK}attn.out_proj"),
        *tables.norm("decoder.layers.mlp_norm", f"{_BLOCK}{norm}_2"),
        *tables.linear("decoder.layers.mlp.up", f"{_BLOCK}{up}"),
        *tables.linear("decoder.layers.mlp.down", f"{_BLOCK}{down}"),
        *tables.norm("decoder.final_norm", f"transformer.{final}"),
    )


MPT = Architecture(
    model_type="mpt",
    class_name="MptForCausalLM",
    layers="transformer.blocks",
    read=read_mpt,
    write=write_mpt,
    rules=_rules("norm", "ffn.up_proj", "ffn.down_proj", "norm_f"),
    marks=("transformer.norm_f.", "transformer.blocks.0.ffn.", "transformer.wte."),
    ignore=(r"^lm_head\.weight$",),  # tied to the embedding; transformers may write it out
)
MOSAIC_GPT = Architecture(
    model_type="mosaic_gpt",
    class_name="MosaicGPT",
    layers="transformer.blocks",
    read=read_mosaic,
    write=write_mosaic,
    rules=_rules("ln", "mlp.mlp_up", "mlp.mlp_down", "ln_f"),
    marks=("transformer.ln_f.", "transformer.blocks.0.mlp.mlp_up."),
    ignore=MPT.ignore,
)
