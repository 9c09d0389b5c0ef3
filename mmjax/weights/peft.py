"""PEFT's LoRA adapters as tables of rules, both ways.

An adapter has one pair A [r, in], B [out, r] a module. Where their module is a fused projection,
our q, k and v have a pair each: importing gives all three the same A and their own rows of B;
exporting puts three different A side by side in one pair of rank 3 r, block-diagonal in B.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.types import MMJaxError
from mmjax.weights.operations import Chunk, Dense, Fused, Op, Shape
from mmjax.weights.reader import Reader
from mmjax.weights.rules import Rule, Tensor, export

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Side:
    """One of several low-rank pairs that share one of theirs: a block of its rows or columns."""

    op: Op
    at: int
    count: int
    rows: bool

    def theirs_shape(self, ours: Shape) -> Shape:
        m, n = self.op.theirs_shape(ours)
        return (m * self.count, n) if self.rows else (m, n * self.count)

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        r = theirs.shape[0 if self.rows else 1] // self.count
        block = slice(self.at * r, (self.at + 1) * r)
        return self.op.view(theirs[block] if self.rows else theirs[:, block], ours)

    def axis(self, ours: Shape) -> int:
        return self.op.axis(ours)


def adapter_rules(rules: Sequence[Rule], paths: Iterable[str] | None = None) -> list[Rule]:
    """Derive the rules of ``lora_a`` and ``lora_b`` beside every kernel of a table.

    paths: our adapters that share a fused module but not their A; they get blocks of one pair.
    """
    blocks = set(paths or ())
    sharing: dict[str, list[str]] = {}
    for rule in rules:
        if rule.ours in blocks:
            sharing.setdefault(rule.theirs, []).append(rule.ours)
    derived = []
    for rule in rules:
        if not rule.ours.endswith(".kernel") or not isinstance(rule.op, Dense | Fused | Chunk):
            continue
        ours, theirs = rule.ours.removesuffix("kernel"), rule.theirs.removesuffix("weight")
        fused = isinstance(rule.op, Fused | Chunk)
        a: Op = Dense(1) if fused else rule.op
        b: Op = rule.op if fused else Dense(1)
        group = sharing.get(rule.theirs, [])
        if rule.ours in group:
            at = group.index(rule.ours)
            a, b = Side(a, at, len(group), rows=True), Side(b, at, len(group), rows=False)
        for side, op in (("a", a), ("b", b)):
            names = f"{ours}lora_{side}", f"{theirs}lora_{side.upper()}.weight"
            derived.append(dataclasses.replace(rule, ours=names[0], theirs=names[1], op=op))
    return derived


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
    ):
        """reader: keys without PEFT's prefix, in the names of ``rules``. shapes: of our kernels.

        theirs: keys of the reader -> those of PEFT's file, which patterns of its config speak of.
        """
        self.reader, self.files = reader, reader.files
        folder = reader.files[0].parent if reader.files else Path()
        _refuse(config, folder)
        modules = {k.removesuffix(".lora_A.weight") for k in list(reader.keys()) if ".lora_A." in k}
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
                f"{len(unknown)} are none of this model's, first {unknown[0]}; give its own base"
            )
        keys = {name: f"{name}.lora_A.weight" for name in modules}
        ranks = {name: reader.shape(key)[0] for name, key in keys.items()}
        peers = {name: _module((theirs or {}).get(key, key)) for name, key in keys.items()}
        self._scales = {name: _scale(config, peers[name], rank) for name, rank in ranks.items()}
        self.rank = max(ranks.values(), default=int(config.get("r", 8)))
        # The common scale, so that an ordinary adapter keeps its B as it is.
        values = list(self._scales.values()) or [1.0]
        self.scale = max(set(values), key=values.count)
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
    "alora_invocation_tokens",
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


def export_adapter(
    rules: Sequence[Rule],
    source: Reader,
    *,
    rank: int,
    alpha: float,
    rename: Callable[[str], str],
    rslora: bool = False,
    dropout: float = 0.0,
    base: str | None = None,
    task: str | None = "CAUSAL_LM",
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the tensors and the adapter_config.json of our LoRA leaves in ``source``.

    rename: their key to the name the exported adapter shall carry. task: what PEFT takes the model
    for, None for any module. The result computes exactly what ours does: q, k and v that no longer
    share one A become a pair of rank 3 r, whose ``rank_pattern`` and ``alpha_pattern`` keep the
    scale alpha / r, or alpha / sqrt(r) with rslora.
    """
    adapted = [
        key.removesuffix("lora_a") + "kernel"
        for key in list(source.keys())
        if key.endswith("lora_a")
    ]
    if not adapted:
        raise MMJaxError("the model has no LoRA parameters; export it without --adapter")
    groups: dict[str, list[str]] = {}
    for rule in rules:
        if rule.ours in adapted:
            groups.setdefault(rule.theirs, []).append(rule.ours)
    blocks = {theirs: group for theirs, group in groups.items() if not _same_a(source, group)}
    table = adapter_rules(rules, [path for group in blocks.values() for path in group])
    tensors = [dataclasses.replace(t, key=PREFIX + rename(t.key)) for t in export(table, source)]
    names = _short_names(rules, groups, rename)
    ranks, alphas = {}, {}
    for theirs, group in blocks.items():
        more = math.sqrt(len(group)) if rslora else len(group)
        ranks[names[theirs]] = rank * len(group)
        alphas[names[theirs]] = _number(alpha * more)
    return tensors, {
        **_PLAIN,
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": dropout,
        "target_modules": _target_modules(names.values()),
        "use_rslora": rslora,
    }


# What PEFT's config says of every adapter of ours.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "use_dora": False,
}
_LAYER = "918273"  # stands for the number of a layer while names are compared


def _short_names(
    rules: Sequence[Rule], adapted: Iterable[str], rename: Callable[[str], str]
) -> dict[str, str]:
    r"""Return the end of each adapted module's name by which PEFT finds it and no other.

    A bare number is never enough: containers are numbered, too. Where only the name before a
    layer's number tells it from others, as from those of a vision tower, it is a regular expression
    with ``\d+`` for the number.
    """
    module = {
        r.theirs: rename(r.theirs.replace("{l}", _LAYER)).removesuffix(".weight") for r in rules
    }
    others = [name for theirs, name in module.items() if theirs not in set(adapted)]
    short = {}
    for theirs in adapted:
        parts = module[theirs].split(".")
        ends = (".".join(parts[at:]) for at in reversed(range(len(parts))))
        end = next(
            (
                end
                for end in ends
                if not end.split(".")[0].isdigit()
                and not any(f".{name}".endswith(f".{end}") for name in others)
            ),
            module[theirs],
        )
        short[theirs] = re.escape(end).replace(_LAYER, r"\d+") if _LAYER in end else end
    return short


def _target_modules(names: Iterable[str]) -> list[str] | str:
    """Return names for PEFT: a list of ends, or one expression of whole names if it takes that."""
    names = sorted(set(names))
    if not any(r"\d+" in name for name in names):
        return names
    each = (name if r"\d+" in name else re.escape(name) for name in names)
    return rf"(.*\.)?({'|'.join(each)})"


def _number(x: float) -> float | int:
    return int(x) if float(x).is_integer() else float(x)


def _same_a(source: Reader, kernels: list[str]) -> bool:
    first, *rest = (kernel.removesuffix("kernel") + "lora_a" for kernel in kernels)
    if not rest:
        return True
    a = source.read(first)
    return all(np.array_equal(a, source.read(other)) for other in rest)
