"""PEFT's LoRA adapters as tables of rules, both ways, and written; ``adapter_reader`` reads them.

An adapter has one pair A [r, in], B [out, r] a module. Where their module is a fused projection,
our q, k and v have a pair each: importing gives all three the same A and their own rows of B;
exporting puts three different A side by side in one pair of rank 3 r, block-diagonal in B.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
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
    scale alpha / r, or alpha / sqrt(r) with rslora. Raises MMJaxError where there is nothing to
    write, and for adapters of convolutions.
    """
    adapted = [
        key.removesuffix("lora_a") + "kernel"
        for key in list(source.keys())
        if key.endswith("lora_a")
    ]
    if not adapted:
        raise MMJaxError("the model has no LoRA parameters; export it without --adapter")
    known = {rule.ours for rule in adapter_rules(rules)}
    stems = (kernel.removesuffix("kernel") for kernel in adapted)
    if odd := [stem.removesuffix(".") for stem in stems if f"{stem}lora_a" not in known]:
        raise MMJaxError(
            f"{', '.join(odd)} is a convolution in PyTorch, whose adapters are not written: write "
            "the model with them merged, without --adapter, or leave it out of lora.targets"
        )
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
    apart = set(adapted)
    others = [name for theirs, name in module.items() if theirs not in apart]
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
