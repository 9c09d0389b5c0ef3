"""The families mmjax knows, one line each; nothing of them is imported before it is used."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from mmjax.types import MMJaxError, nearest


@dataclasses.dataclass(frozen=True)
class Family:
    """A folder ``mmjax/models/<name>`` whose classes are ``<prefix>``, ``<prefix>Config``, ....

    model_types: values of ``model_type`` in config.json that belong to it.
    """

    name: str
    prefix: str
    model_types: tuple[str, ...]

    def _module(self, part: str) -> ModuleType:
        return importlib.import_module(f"mmjax.models.{self.name}.{part}")

    @property
    def Model(self) -> Any:
        return getattr(self._module("model"), self.prefix)

    @property
    def Config(self) -> Any:
        return getattr(self._module("model"), f"{self.prefix}Config")

    @property
    def Processor(self) -> Any:
        return getattr(self._module("processor"), f"{self.prefix}Processor")

    @property
    def weights(self) -> ModuleType:
        """The module with rules(config), IGNORE and the layouts."""
        return self._module("weights")


LANGUAGES = (
    "llama", "mpt", "mosaic_gpt", "gpt_neox", "opt", "phi", "phi3", "stablelm", "stablelm_epoch",
    "qwen2", "minicpm", "gemma",
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "flamingo": Family("flamingo", "Flamingo", ("flamingo", "otter")),
    "bunny": Family(
        "bunny",
        "Bunny",
        tuple(
            f"bunny-{language}"
            for language in (
                *("phi", "stablelm", "qwen", "qwen2", "minicpm", "phi3", "llama", "gemma"),
            )
        ),
    ),
    "language": Family("language", "Language", LANGUAGES),
    "fuyu": Family("fuyu", "Fuyu", ("fuyu",)),
}
"""In the order in which ``detect`` asks: Fuyu's marks, lm_head among them, fit the others, too."""


def family(name: str) -> Family:
    """Return a family by name; raises MMJaxError with the nearest known name."""
    if name not in FAMILIES:
        near = nearest(name, FAMILIES)
        raise MMJaxError(f"family {name!r} is unknown; one of {', '.join(FAMILIES)}{near}")
    return FAMILIES[name]


def named_by(hf_config: Mapping[str, Any]) -> Family | None:
    """Return the family whose ``model_type`` a config.json states, None if it states none."""
    kind = hf_config.get("model_type")
    return next((one for one in FAMILIES.values() if kind in one.model_types), None)


def nearest_type(hf_config: Mapping[str, Any]) -> str | None:
    """Return the known ``model_type`` that an unknown one is probably meant to be."""
    known = [kind for one in FAMILIES.values() for kind in one.model_types]
    stated = hf_config.get("model_type")
    near = difflib.get_close_matches(str(stated), known, 1) if stated not in known else []
    return near[0] if near else None


def detect(hf_config: Mapping[str, Any], keys: Iterable[str]) -> tuple[Family, str]:
    """Tell the family and the layout of a model from its config.json and its keys.

    The keys decide which layout it is; ``model_type`` decides between families, where it is given.
    Raises MMJaxError when no family claims it.
    """
    keys = list(keys)
    kind = hf_config.get("model_type")
    candidates = [f for f in FAMILIES.values() if kind in f.model_types]
    for one in candidates if kind else FAMILIES.values():
        layout = one.weights.detect_layout(keys)
        if layout is not None:
            return one, layout
    shown = ", ".join(sorted(keys)[:4])
    says = f"config.json says model_type {kind!r}" if kind else "there is no model_type"
    if near := nearest_type(hf_config):
        raise MMJaxError(f"{says}, which no family of mmjax has; did you mean {near!r}?")
    raise MMJaxError(
        f"no family of mmjax ({', '.join(FAMILIES)}) knows this model: {says} and the "
        f"{len(keys)} keys begin with {shown}. Give the folder of a supported model"
    )
