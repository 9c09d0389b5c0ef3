"""Lines that every table of rules is made of: norms, linear maps, fused projections.

A line whose parameter a model does not have, such as the bias of a map without one, claims nothing.
"""

from __future__ import annotations

from mmjax.weights.operations import Fused, Op, flat, reshape_in, transpose
from mmjax.weights.rules import Rule


def norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Return the rules of a norm's scale and bias."""
    return Rule(f"{ours}.scale", f"{theirs}.weight"), Rule(f"{ours}.bias", f"{theirs}.bias")


def linear(ours: str, theirs: str, op: Op = transpose) -> tuple[Rule, ...]:
    """Return the rules of a linear map: its kernel by ``op``, and its bias."""
    return Rule(f"{ours}.kernel", f"{theirs}.weight", op), Rule(f"{ours}.bias", f"{theirs}.bias")


def to_heads(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Return the rules of a map [d] -> [n, h]; theirs has the heads side by side."""
    kernel, bias = linear(ours, theirs)
    return kernel, Rule(bias.ours, bias.theirs, flat)


def from_heads(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Return the rules of a map [n, h] -> [d]."""
    return linear(ours, theirs, reshape_in(2))


def split_qkv(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Return the rules of q, k and v under ``ours``, which theirs calls ``q_proj`` and so on."""
    return tuple(rule for x in "qkv" for rule in to_heads(f"{ours}.{x}", f"{theirs}.{x}_proj"))


def fused_qkv(
    ours: str, weight: str, bias: str | None = None, *, by_head: bool
) -> tuple[Rule, ...]:
    """Return the rules of q, k and v under ``ours`` that are one map of theirs; see Fused.

    weight, bias: their whole keys; without bias none is claimed.
    """
    rules: list[Rule] = []
    for i, name in enumerate("qkv"):
        op = Fused(i, 3, by_head)
        rules.append(Rule(f"{ours}.{name}.kernel", weight, op))
        if bias is not None:
            rules.append(Rule(f"{ours}.{name}.bias", bias, op))
    return tuple(rules)
