"""Flamingo's published weights: OpenFlamingo's names, and Otter's.

The table speaks OpenFlamingo's names of the language model, the resampler and the gated blocks. The
towers differ by more than names, so there are two tables: ``openflamingo`` with open_clip's tower,
``otter`` with transformers'.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from mmjax.models import vit_tables
from mmjax.models.flamingo.assemble import GATED, LANGUAGE, TOWERS, assemble
from mmjax.models.flamingo.otter_config import completed
from mmjax.models.language.architectures import ARCHITECTURES
from mmjax.models.language.weights import IGNORE as LANGUAGE_IGNORE
from mmjax.models.parts import Partial
from mmjax.weights import tables
from mmjax.weights.operations import Fused, transpose
from mmjax.weights.rules import Rule
from mmjax.weights.tuning import PeerNames, module_of

__all__ = ["assemble", "completed"]  # parts of the contract that have files of their own

LAYOUTS = ("otter", "openflamingo")
ADAPTER_LAYOUT = "otter"
ADAPTER_TASK = None  # for PEFT the peers' models are modules like any other

IGNORE = (
    r"^lang_encoder\.lm_head\.weight$",  # where the head is tied to the embedding
    *(p for p in LANGUAGE_IGNORE if not p.startswith("^")),
    r"^vision_encoder\.proj$",  # CLIP's map into the space of its text tower
    r"embeddings\.position_ids$",
    # The second and third name of the same tensors inside the peer's module.
    r"^lang_encoder\.old_decoder_blocks\.",
    r"^lang_encoder\.gated_cross_attn_layers\.",
)


def rules(config: Any, layout: str = "otter") -> tuple[Rule, ...]:
    """Return the table of a Flamingo of this config, with the tower of a layout."""
    own = ARCHITECTURES[config.architecture]
    inside = (
        dataclasses.replace(
            rule, theirs="lang_encoder." + rule.theirs.replace("{l}", "{l}.decoder_layer")
        )
        for rule in own.rules
    )
    block = f"lang_encoder.{own.layers}.{{l}}.{GATED}."
    every = config.cross_every
    gated = (
        *_block("cross", f"{block}attn.norm", f"{block}attn.", f"{block}ff."),
        Rule("cross.attn_gate", f"{block}attn_gate"),
        Rule("cross.ff_gate", f"{block}ff_gate"),
    )
    gated = (dataclasses.replace(rule, first=every - 1, step=every) for rule in gated)
    layer = "perceiver.layers.{l}."
    return (
        *vit_tables.table(*TOWERS[layout]),
        Rule("perceiver.latents", "perceiver.latents"),
        Rule("perceiver.frame_embed", "perceiver.frame_embs"),
        Rule("perceiver.media_embed", "perceiver.media_time_embs"),
        *tables.norm("perceiver.layers.media_norm", f"{layer}0.norm_media"),
        *_block("perceiver.layers", f"{layer}0.norm_latents", f"{layer}0.", f"{layer}1."),
        *tables.norm("perceiver.final_norm", "perceiver.norm"),
        *gated,
        *inside,
    )


def _block(ours: str, norm: str, attn: str, feed_forward: str) -> tuple[Rule, ...]:
    """Return the rules of attention and MLP, which resampler and gated blocks name alike."""
    queries = "latent_norm" if ours.startswith("perceiver") else "attn_norm"
    return (
        *tables.norm(f"{ours}.{queries}", norm),
        Rule(f"{ours}.attn.q.kernel", f"{attn}to_q.weight", transpose),
        Rule(f"{ours}.attn.k.kernel", f"{attn}to_kv.weight", Fused(0, 2, by_head=False)),
        Rule(f"{ours}.attn.v.kernel", f"{attn}to_kv.weight", Fused(1, 2, by_head=False)),
        *tables.from_heads(f"{ours}.attn.o", f"{attn}to_out"),
        *tables.norm(f"{ours}.mlp_norm", f"{feed_forward}0"),
        *tables.linear(f"{ours}.mlp.up", f"{feed_forward}1"),
        *tables.linear(f"{ours}.mlp.down", f"{feed_forward}3"),
    )


def detect_layout(keys: Iterable[str]) -> str | None:
    """Tell ``otter`` or ``openflamingo`` by the keys; None if it is no Flamingo."""
    keys = [clean(key) for key in keys]
    if not any(key.startswith(LANGUAGE) or key == "perceiver.latents" for key in keys):
        return None
    otter = any(".feed_forward." in key or ".vision_model." in key for key in keys)
    return "otter" if otter else "openflamingo"


_WRAPPERS = re.compile(r"(^|\.)(module|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_TO_OTTER = (
    (re.compile(r"^(perceiver\.layers\.\d+)\.0\."), r"\1."),
    (re.compile(r"^(perceiver\.layers\.\d+)\.1\."), r"\1.feed_forward."),
    (re.compile(rf"\.{GATED}\.ff\."), f".{GATED}.feed_forward."),
)
_FROM_OTTER = (
    (re.compile(r"^(perceiver\.layers\.\d+)\.feed_forward\."), r"\1.1."),
    (re.compile(r"^(perceiver\.layers\.\d+)\.(norm_media|norm_latents|to_)"), r"\1.0.\2"),
    (re.compile(rf"\.{GATED}\.feed_forward\."), f".{GATED}.ff."),
)


_PEFT = (
    (re.compile(r"^lang_encoder\.base_model\.model\."), "lang_encoder."),
    (re.compile(r"\.base_layer\.(?=(weight|bias)$)"), "."),
    (re.compile(r"\.(lora_[AB])\.[^.]+\.weight$"), r".\1.weight"),
)


def clean(key: str) -> str:
    """Return a key without the names of wrappers: DDP's, FSDP's, checkpointing's and PEFT's."""
    key = _WRAPPERS.sub("", key).removeprefix(".")
    for pattern, new in _PEFT:
        key = pattern.sub(new, key)
    return key


def to_hub(key: str, layout: str) -> str:
    """Rename a key of a layout to the name that the layout's table speaks."""
    key = clean(key)
    key = re.sub(r"^vision_encoder\.visual\.", "vision_encoder.", key)  # version 1
    for pattern, new in _FROM_OTTER if layout == "otter" else ():
        key = pattern.sub(new, key)
    return key


def from_hub(key: str, layout: str) -> str:
    """Rename a key of the table for a layout that is written."""
    for pattern, new in _TO_OTTER if layout == "otter" else ():
        key = pattern.sub(new, key)
    return key


def lora_target(kernel: str) -> str:
    """Return the name by which ``nn.LoRA.targets`` knows a kernel: ``attn.q``, ``cross.mlp.up``."""
    name = re.sub(r"^decoder\.(layers\.)?", "", kernel).removesuffix(".kernel")
    return re.sub(r"^(vision|perceiver)\.layers\.", r"\1.", name)


def tuning(config: Any) -> PeerNames:
    """Return what instruct_flamingo's tuning configs can name in a Flamingo of this config.

    Adapters go into its ``lang_encoder``: the language model and the gated blocks in it. The tower
    is never trained there, whatever a file unfreezes: it runs without gradients.
    """
    trained = tuple(r for r in rules(config) if not r.theirs.startswith("vision_encoder."))
    return PeerNames(
        adapted=tuple(r for r in trained if r.theirs.startswith("lang_encoder.")),
        trained=trained,
        elsewhere=frozenset(module_of(r) for one in ARCHITECTURES.values() for r in one.rules),
    )


_TABLES = re.compile(
    r"^lang_encoder\.(.*\.)?(wte|embed_tokens|embed_positions|embed_in|embed_out|lm_head)\.weight$"
)


def is_trained(key: str, config: Any) -> bool:
    """Tell whether OpenFlamingo trains a tensor, by its key: then it is in ``checkpoint.pt``.

    An output table of its own is written too. The peer leaves LLaMA's out, and draws the rows of
    its new tokens anew at each start.
    """
    own = key.startswith("perceiver.") or f".{GATED}." in key
    return own or _TABLES.match(key) is not None


PARTIAL = {"openflamingo": Partial("checkpoint.pt", is_trained)}
