"""Bunny's published weights: full and merged models, projectors, and what adapters lie beside.

The table speaks the names of a full model: the language model's own, ``model.mm_projector.`` and
``model.vision_tower.vision_tower.``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from mmjax.models import vit_tables
from mmjax.models.bunny import projector
from mmjax.models.bunny.assemble import (
    PROJECTOR,
    READ_ALONE,
    TOWER,
    assemble,
    tower_layout,
    tower_root,
)
from mmjax.models.bunny.unused import completed
from mmjax.models.language import weights as language
from mmjax.models.parts import Partial
from mmjax.weights.rules import Rule

log = logging.getLogger(__name__)

__all__ = ["assemble", "completed"]  # parts of the contract that have files of their own

_SHORT = re.compile(
    rf"^{re.escape(TOWER)}(?=(embeddings|pre_layrnorm|encoder|post_layernorm|head)\.)"
)
LAYOUTS = ("bunny", "projector")
ADAPTER_LAYOUT = "bunny"
# SigLIP's pooling, which no feature depends on. PEFT adapts its maps where they are called as Phi's
# are, in the peer's continuous fine-tuning.
UNUSED_MAPS = (rf"^{re.escape(TOWER)}vision_model\.head\.",)
IGNORE = (
    r"^lm_head\.bias$",  # of phi; Bunny's head has none
    *UNUSED_MAPS,
    *language.IGNORE,
    *projector.IGNORE,
)


def rules(config: Any, layout: str = "bunny") -> tuple[Rule, ...]:
    """Return the table of a Bunny of this config, its tower in transformers' or EVA's names.

    layout: ``bunny``, with ``+open_clip`` or ``+timm_siglip`` where the tower has that library's
    names, and with ``+fused`` where q, k and v are one map; all are read alone.
    """
    odd = layout.split("+")
    tower = next((name for name in READ_ALONE if name in odd), tower_layout(config.vision))
    return (
        *vit_tables.table(tower, tower_root(tower)),
        *projector.rules(config.projector, PROJECTOR),
        *language.rules(config, language.FUSED if language.FUSED in odd else "hub"),
    )


def detect_layout(keys: Iterable[str]) -> str | None:
    """Tell ``bunny`` by its projector or its tower, ``projector`` if it is that alone, or None."""
    keys = [clean(key) for key in keys]
    if not any(key.startswith((PROJECTOR, TOWER)) for key in keys):
        return None
    return LAYOUTS[all(key.startswith(PROJECTOR) for key in keys)]


def clean(key: str) -> str:
    """Return a key without the names of wrappers, PEFT's and DDP's.

    A tower of transformers 5 gets the ``vision_model.`` which that has dropped.
    """
    key = key.removeprefix("module.").removeprefix("base_model.model.")
    key = re.sub(r"^(?=(mm_projector|vision_tower)\.)", "model.", key)
    return _SHORT.sub(f"{TOWER}vision_model.", key)


def to_hub(key: str, layout: str) -> str:
    """Rename a key of a file to the name that the table speaks."""
    return clean(key)


def from_hub(key: str, layout: str) -> str:
    """Return the name under which a key is written: the table's own."""
    return key


def lora_target(kernel: str) -> str:
    """Return the name by which ``nn.LoRA.targets`` knows a kernel: ``attn.q``, ``projector.0``."""
    name = re.sub(r"^decoder\.(layers\.)?", "", kernel).removesuffix(".kernel")
    return re.sub(r"^(vision|projector)\.layers\.", r"\1.", name)


def _of_projector(key: str, config: Any) -> bool:
    return key.startswith(PROJECTOR)


def _beside_adapter(key: str, config: Any) -> bool:
    return key.startswith((PROJECTOR, TOWER) if config.unfreeze_vision_tower else PROJECTOR)


def _tower_left_out(config: Any) -> dict[str, Any]:
    """Say that the tower is the published one, which Bunny's loader wants of a projector alone."""
    if config.unfreeze_vision_tower:
        log.warning(
            "a projector alone leaves out the vision tower, which was trained: Bunny's loader takes"
            " the one that config.json names; write the whole model (no --layout) to keep it"
        )
    return {"unfreeze_vision_tower": False}


PARTIAL = {"projector": Partial("mm_projector.bin", _of_projector, _tower_left_out, adapted=False)}
ADAPTER_BESIDE = Partial("non_lora_trainables.bin", _beside_adapter)
