"""Published language models: Hugging Face's names, a layout for each architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mmjax.models.language.architectures import ARCHITECTURES, told_by
from mmjax.types import MMJaxError
from mmjax.weights.reader import Reader
from mmjax.weights.rules import Rule

LAYOUTS = ("hub", "transformers5")
FUSED = "fused"  # of older files, in which q, k and v are one map
ADAPTER_LAYOUT = "transformers5"  # PEFT names modules as they stand in memory
IGNORE = tuple(
    # A tied head may be written out beside the embedding.
    dict.fromkeys([r"^lm_head\.weight$", *(p for a in ARCHITECTURES.values() for p in a.ignore)])
)


def rules(config: Any, layout: str = "hub") -> tuple[Rule, ...]:
    """Return the table of a language model of this config; ``config.architecture`` is read."""
    own = ARCHITECTURES[config.architecture]
    return tuple(own.fused or own.rules) if layout == FUSED else tuple(own.rules)


def detect_layout(keys: Iterable[str]) -> str | None:
    """Tell the architecture by the keys, or ``FUSED``; None if it is none of these."""
    found = told_by(keys := list(keys))
    if found is None:
        return None
    fused = found.fused and any(".self_attn.query_key_value." in key for key in keys)
    return FUSED if fused else found.model_type


def to_hub(key: str, layout: str) -> str:
    """Rename a key to the hub's name, which the table speaks.

    Old OPT files lack the outer ``model.``; transformers 5 calls GPT-NeoX's head ``lm_head`` in
    memory, and so may a file.
    """
    if layout == "opt":
        return re.sub(r"^decoder\.", "model.decoder.", key)
    if layout == "gpt_neox":
        return re.sub(r"^lm_head\.", "embed_out.", key)
    return key


def from_hub(key: str, layout: str) -> str:
    """Return the name under which a key is written; the hub's is what transformers reads."""
    if layout == "transformers5":  # as modules are named in memory, for PEFT
        return re.sub(r"^embed_out\.", "lm_head.", key)
    return key


def lora_target(kernel: str) -> str:
    """Return the name by which ``nn.LoRA.targets`` knows a kernel: ``attn.q``, ``mlp.up``."""
    return re.sub(r"^decoder\.(layers\.)?", "", kernel).removesuffix(".kernel")


def guess_config(reader: Reader) -> dict[str, Any]:
    """Raise MMJaxError: heads and positions cannot be read off a language model's tensors."""
    where = reader.files[0].parent if reader.files else "model"
    raise MMJaxError(
        f"{where}: a language model without config.json, which tells its heads and positions; copy "
        "it beside the weights"
    )
