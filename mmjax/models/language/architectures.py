"""The architectures of language models that mmjax knows, by their ``model_type``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmjax.models.language.architecture import Architecture
from mmjax.models.language.gemma import GEMMA
from mmjax.models.language.llama import LLAMA
from mmjax.models.language.minicpm import MINICPM
from mmjax.models.language.mpt import MOSAIC_GPT, MPT
from mmjax.models.language.neox import NEOX
from mmjax.models.language.opt import OPT
from mmjax.models.language.phi import PHI
from mmjax.models.language.phi3 import PHI3
from mmjax.models.language.qwen2 import QWEN2
from mmjax.models.language.stablelm import STABLELM
from mmjax.types import MMJaxError

ARCHITECTURES: dict[str, Architecture] = {
    one.model_type: one
    for one in (MOSAIC_GPT, MPT, NEOX, OPT, PHI, PHI3, STABLELM, LLAMA, QWEN2, MINICPM, GEMMA)
}
"""In the order in which ``told_by`` asks: LLaMA's marks fit those before it, too."""

_ALIASES = {alias: one for one in ARCHITECTURES.values() for alias in one.aliases}


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a config.json names; raises MMJaxError with those there are."""
    name = hf.get("model_type")
    found = ARCHITECTURES.get(str(name)) or _ALIASES.get(str(name))
    if found is None:
        raise MMJaxError(
            f"config.json says model_type {name!r}, which is no language model of mmjax; one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return found


def told_by(keys: Iterable[str]) -> Architecture | None:
    """Tell the architecture from a model's keys, None if it is none of these.

    Qwen2, MiniCPM and Gemma have LLaMA's names, and are told to be LLaMA.
    """
    keys = list(keys)
    for one in ARCHITECTURES.values():
        if any(key.startswith(one.marks) for key in keys):
            return one
    return None
