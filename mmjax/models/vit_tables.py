"""Names of a vision tower's tensors in the files of those who publish it."""

from __future__ import annotations

import re
from collections.abc import Callable

from mmjax.weights import tables
from mmjax.weights.operations import Leading, conv_patch, flat, transpose
from mmjax.weights.rules import Rule

IGNORE = (
    r"^proj$",  # into the space of a text tower
    r"^head\.",  # SigLIP's pooling, EVA's projection
    r"^attn_pool\.",  # SigLIP's pooling in timm
    r"(^|\.)rope\.",  # EVA's angles
    r"^embeddings\.position_ids$",
)
"""Keys behind a root that are no part of a tower here; what is exported does not have them."""


def open_clip(root: str, ours: str = "vision") -> tuple[Rule, ...]:
    """Return the table of an open_clip VisionTransformer whose keys begin with ``root``."""
    block = f"{root}transformer.resblocks.{{l}}."
    fused = f"{block}attn.in_proj_weight", f"{block}attn.in_proj_bias"
    return (
        Rule(f"{ours}.class_token", f"{root}class_embedding"),
        Rule(f"{ours}.positions", f"{root}positional_embedding"),
        *tables.linear(f"{ours}.embed", f"{root}conv1", conv_patch),
        *tables.norm(f"{ours}.pre_norm", f"{root}ln_pre"),
        *tables.norm(f"{ours}.layers.attn_norm", f"{block}ln_1"),
        *tables.fused_qkv(f"{ours}.layers.attn", *fused, by_head=False),
        *tables.from_heads(f"{ours}.layers.attn.o", f"{block}attn.out_proj"),
        *tables.norm(f"{ours}.layers.mlp_norm", f"{block}ln_2"),
        *tables.linear(f"{ours}.layers.mlp.up", f"{block}mlp.c_fc"),
        *tables.linear(f"{ours}.layers.mlp.down", f"{block}mlp.c_proj"),
        *tables.norm(f"{ours}.final_norm", f"{root}ln_post"),
    )


def transformers(root: str, ours: str = "vision") -> tuple[Rule, ...]:
    """Return the table of a CLIPVisionModel or SiglipVisionModel whose keys begin with ``root``.

    root: with the ``vision_model.`` that transformers wrote up to its version 4.
    """
    layer, embed = f"{root}encoder.layers.{{l}}.", f"{root}embeddings."
    return (
        Rule(f"{ours}.class_token", f"{embed}class_embedding"),
        Rule(f"{ours}.positions", f"{embed}position_embedding.weight"),
        *tables.linear(f"{ours}.embed", f"{embed}patch_embedding", conv_patch),
        *tables.norm(f"{ours}.pre_norm", f"{root}pre_layrnorm"),  # so spelt there
        *tables.norm(f"{ours}.layers.attn_norm", f"{layer}layer_norm1"),
        *(
            rule
            for name in "qkv"
            for rule in tables.to_heads(
                f"{ours}.layers.attn.{name}", f"{layer}self_attn.{name}_proj"
            )
        ),
        *tables.from_heads(f"{ours}.layers.attn.o", f"{layer}self_attn.out_proj"),
        *tables.norm(f"{ours}.layers.mlp_norm", f"{layer}layer_norm2"),
        *tables.linear(f"{ours}.layers.mlp.up", f"{layer}mlp.fc1"),
        *tables.linear(f"{ours}.layers.mlp.down", f"{layer}mlp.fc2"),
        *tables.norm(f"{ours}.final_norm", f"{root}post_layernorm"),
    )


def eva(root: str, ours: str = "vision") -> tuple[Rule, ...]:
    """Return the table of an EVA-02 of EVA-CLIP whose keys begin with ``root``."""
    block = f"{root}blocks.{{l}}."
    attn, mlp = f"{ours}.layers.attn", f"{ours}.layers.mlp"
    return (
        Rule(f"{ours}.class_token", f"{root}cls_token", Leading(2)),
        Rule(f"{ours}.positions", f"{root}pos_embed", Leading(1)),
        *tables.linear(f"{ours}.embed", f"{root}patch_embed.proj", conv_patch),
        *tables.norm(f"{ours}.layers.attn_norm", f"{block}norm1"),
        *(Rule(f"{attn}.{x}.kernel", f"{block}attn.{x}_proj.weight", transpose) for x in "qkv"),
        *(Rule(f"{attn}.{x}.bias", f"{block}attn.{x}_bias", flat) for x in "qv"),
        *tables.norm(f"{attn}.sub_norm", f"{block}attn.inner_attn_ln"),
        *tables.from_heads(f"{attn}.o", f"{block}attn.proj"),
        *tables.norm(f"{ours}.layers.mlp_norm", f"{block}norm2"),
        *tables.linear(f"{mlp}.gate", f"{block}mlp.w1"),
        *tables.linear(f"{mlp}.up", f"{block}mlp.w2"),
        *tables.norm(f"{mlp}.sub_norm", f"{block}mlp.ffn_ln"),
        *tables.linear(f"{mlp}.down", f"{block}mlp.w3"),
        *tables.norm(f"{ours}.final_norm", f"{root}norm"),
    )


def timm_siglip(root: str, ours: str = "vision") -> tuple[Rule, ...]:
    """Return the table of a SigLIP of timm whose keys begin with ``root``."""
    block = f"{root}blocks.{{l}}."
    fused = f"{block}attn.qkv.weight", f"{block}attn.qkv.bias"
    return (
        Rule(f"{ours}.positions", f"{root}pos_embed", Leading(1)),
        *tables.linear(f"{ours}.embed", f"{root}patch_embed.proj", conv_patch),
        *tables.norm(f"{ours}.layers.attn_norm", f"{block}norm1"),
        *tables.fused_qkv(f"{ours}.layers.attn", *fused, by_head=False),
        *tables.from_heads(f"{ours}.layers.attn.o", f"{block}attn.proj"),
        *tables.norm(f"{ours}.layers.mlp_norm", f"{block}norm2"),
        *tables.linear(f"{ours}.layers.mlp.up", f"{block}mlp.fc1"),
        *tables.linear(f"{ours}.layers.mlp.down", f"{block}mlp.fc2"),
        *tables.norm(f"{ours}.final_norm", f"{root}norm"),
    )


_TIMM = (
    (re.compile(r"\.attn\.([qv])_proj\.bias$"), r".attn.\1_bias"),
    (re.compile(r"\.attn\.norm\."), ".attn.inner_attn_ln."),
    (re.compile(r"\.mlp\.fc1_g\."), ".mlp.w1."),
    (re.compile(r"\.mlp\.fc1_x\."), ".mlp.w2."),
    (re.compile(r"\.mlp\.fc2\."), ".mlp.w3."),
    (re.compile(r"\.mlp\.norm\."), ".mlp.ffn_ln."),
)


def from_timm(key: str) -> str:
    """Rename a key of timm's EVA-02, open_clip's too, to the one that the table ``eva`` speaks."""
    for pattern, new in _TIMM:
        key = pattern.sub(new, key)
    return key


LAYOUTS: dict[str, Callable[..., tuple[Rule, ...]]] = {
    "open_clip": open_clip,
    "hf_clip": transformers,
    "hf_siglip": transformers,
    "eva": eva,
    "timm_siglip": timm_siglip,
}


def table(layout: str, root: str, ours: str = "vision") -> tuple[Rule, ...]:
    """Return the table of a tower of a layout, a name in ``LAYOUTS``.

    root: what its keys begin with there. ours: the path of the tower here.
    """
    return LAYOUTS[layout](root, ours)
