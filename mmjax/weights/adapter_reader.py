"""Read a PEFT adapter as one whose modules all have one rank and one scale."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.types import MMJaxError
from mmjax.weights.operations import Shape
from mmjax.weights.peft import PREFIX
from mmjax.weights.reader import Reader
from mmjax.weights.rules import Rule


class AdapterReader:
    """An adapter with every module at one rank and one scale, and every layer present.

    ``rank_pattern`` is evened out with zeros, differing scales go into B, and layers the adapter
    leaves out get a pair of zeros: exactly what PEFT computes. ``rank``, ``alpha``, ``rslora``,
    ``dropout`` and ``kernels`` (our adapted kernels) say what it amounts to.
    """

    def __init__(
        self,
        reader: Reader,
        config: Mapping[str, Any],
        rules: Sequence[Rule],
        shapes: Mapping[str, Shape],
        theirs: Mapping[str, str] | None = None,
        unused: Sequence[str] = (),
    ):
        """reader: keys without PEFT's prefix, in the names of ``rules``. shapes: of our kernels.

        theirs: keys of the reader -> those of PEFT's file, which patterns of its config speak of.
        unused: patterns of maps that no output depends on; their pairs are left out. (Not of all
        that a model is read without: a head that is tied in one model is a map in another.)
        """
        self.reader, self.files = reader, reader.files
        folder = reader.files[0].parent if reader.files else Path()
        _refuse(config, folder)
        names = list(reader.keys())
        if table := next((k for k in sorted(names) if ".lora_embedding_" in k), None):
            raise MMJaxError(
                f"{folder}: adapts a table of tokens ({table}), and only maps are adapted here; "
                "merge the adapter with PEFT (merge_and_unload), save the model and convert it"
            )
        modules = {k.removesuffix(".lora_A.weight") for k in names if ".lora_A." in k}
        modules = {m for m in modules if not any(re.search(p, f"{m}.weight") for p in unused)}
        self.kernels, self._like = [], {}
        for rule in rules:
            if not rule.ours.endswith(".kernel") or rule.ours not in shapes:
                continue
            names = [k.removesuffix(".weight") for k in rule.keys(shapes[rule.ours])]
            there = [name for name in names if name in modules]
            if there:
                self.kernels.append(rule.ours)
                self._like.update(dict.fromkeys(names, there[0]))
                self._check_widths(there[0], rule.op.theirs_shape(rule.inner(shapes[rule.ours])))
        if unknown := sorted(modules - self._like.keys()):
            raise MMJaxError(
                f"{folder}: an adapter of another model: of its {len(modules)} modules "
                f"{len(unknown)} are none of this model's, first {unknown[0]}; give its own base "
                "(a head tied to the embedding is no map of its own)"
            )
        # Sorted: a set has another order in every process.
        keys = {name: f"{name}.lora_A.weight" for name in sorted(modules)}
        ranks = {name: reader.shape(key)[0] for name, key in keys.items()}
        peers = {name: _module((theirs or {}).get(key, key)) for name, key in keys.items()}
        self._scales = {name: _scale(config, peers[name], rank) for name, rank in ranks.items()}
        self.rank = max(ranks.values(), default=int(config.get("r", 8)))
        # The commonest scale, so that an ordinary adapter keeps its B; of several the first.
        common = collections.Counter(self._scales.values()).most_common(1)
        self.scale = common[0][0] if common else 1.0
        self.rslora = bool(config.get("use_rslora"))
        self.dropout = float(config.get("lora_dropout") or 0.0)
        self.alpha = self.scale * (math.sqrt(self.rank) if self.rslora else self.rank)
        self._claimed = {f"{name}.lora_{side}.weight" for name in self._like for side in ("A", "B")}

    def _check_widths(self, name: str, base: Shape) -> None:
        """Raise MMJaxError unless the pair of a module fits its kernel, [out, in]."""
        try:
            low, high = (self.reader.shape(f"{name}.lora_{side}.weight") for side in "AB")
        except KeyError:
            raise MMJaxError(f"{name}.lora_B.weight is missing; copy the adapter anew") from None
        if (high[0], low[1]) != base:
            raise MMJaxError(
                f"{self.files[0].parent}: an adapter of another model: at {name} it is for a map "
                f"[out, in] of {[high[0], low[1]]}, and this model's is {list(base)}; give its own "
                "base"
            )

    def keys(self) -> Iterable[str]:
        # What no rule knows stays visible, so that the strict check names it.
        return self._claimed | set(self.reader.keys())

    def shape(self, key: str) -> Shape:
        if key not in self._claimed:
            return tuple(self.reader.shape(key))
        like, side = self._source(key)
        m, n = self.reader.shape(f"{like}.lora_{side}.weight")
        return (self.rank, n) if side == "A" else (m, self.rank)

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(np.float32) if key in self._claimed else self.reader.dtype(key)

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        if key not in self._claimed:
            return self.reader.read(key, index)
        _, side = self._source(key)
        out = np.zeros(self.shape(key), np.float32)
        name = key.rsplit(".lora_", 1)[0]
        if name in self._scales:
            part = self.reader.read(key).astype(np.float32)
            if side == "B" and self._scales[name] != self.scale:
                part = part * np.float32(self._scales[name] / self.scale)
            out[: part.shape[0], : part.shape[1]] = part
        return out[index]

    def _source(self, key: str) -> tuple[str, str]:
        name, side = key.removesuffix(".weight").rsplit(".lora_", 1)
        return self._like[name], side


# Settings under which PEFT computes something else than W + scale B A.
_SWITCHES = (
    "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "alora_invocation_tokens", "target_parameters", "trainable_token_indices", "arrow_config",
    "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
# Ways to begin that take the first B A out of W: the file holds no such W.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise MMJaxError(f"{folder}: a {config['peft_type']} adapter; only LORA is supported")
    begun = str(config.get("init_lora_weights", True))
    if begun.lower().startswith(_CHANGES_BASE):
        raise MMJaxError(
            f"{folder}: adapter_config.json says init_lora_weights {begun!r}: its base is not the "
            "published one but what that left of it; merge the adapter with PEFT "
            "(merge_and_unload), save the model and convert that"
        )
    for switch in _SWITCHES:
        if config.get(switch):
            raise MMJaxError(
                f"{folder}: adapter_config.json sets {switch}, which is not supported; merge the "
                "adapter with PEFT (merge_and_unload) if that can be, save the model and convert it"
            )


def _module(key: str) -> str:
    """Return the name of the module that PEFT adapted, from a key of its file."""
    return key.removeprefix(PREFIX).removesuffix(".lora_A.weight")


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
