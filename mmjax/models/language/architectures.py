"""The architectures of language models that mmjax knows, by their ``model_type``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmjax.models.language.architecture import Architecture
from mmjax.models.language.llama import LLAMA
from mmjax.models.language.mpt import MOSAIC_GPT, MPT
from mmjax.models.language.neox import NEOX
from mmjax.models.language.opt import OPT
from mmjax.types import MMJaxError

ARCHITECTURES: dict[str, Architecture] = {
    one.model_type: one for one in (LLAMA, MOSAIC_GPT, MPT, NEOX, OPT)
}


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a config.json names; raises MMJaxError with those there are."""
    name = hf.get("model_type")
    if name not in ARCHITECTURES:
        raise MMJaxError(
            f"config.json says model_type {name!r}, which is no language model of mmjax; one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def told_by(keys: Iterable[str]) -> Architecture | None:
    """Tell the architecture from a checkpoint's keys, None if it is none of these."""
    keys = list(keys)
    for one in ARCHITECTURES.values():
        if any(key.startswith(one.marks) for key in keys):
            return one
    return None
