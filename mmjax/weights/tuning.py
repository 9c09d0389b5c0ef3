"""What a peer's tuning config may name: its modules, and the parameters it can unfreeze.

A family that reads such files has a function ``tuning(config) -> PeerNames`` in its ``weights``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mmjax.weights.rules import Rule


@dataclasses.dataclass(frozen=True)
class PeerNames:
    """The names of one model's parameters in the peer, as its tables of weights have them.

    adapted: rules of the part that adapters go into. trained: rules of all that can be unfrozen.
    elsewhere: names of modules that other models of the family have, for files written for several.
    """

    adapted: tuple[Rule, ...]
    trained: tuple[Rule, ...]
    elsewhere: frozenset[str] = frozenset()

    def kernels(self, target: str, names: Iterable[str]) -> list[str]:
        """Return our kernels in the modules whose name is ``target`` or ends with it, as in PEFT.

        names: our parameters, of which a rule may name more than a model has.
        """
        there = set(names)
        return [
            rule.ours
            for rule in self.adapted
            if rule.ours in there and _ends_with(module_of(rule), target)
        ]

    def holding(self, part: str, names: Iterable[str]) -> list[str]:
        """Return our parameters whose name in the peer holds a string anywhere."""
        there = set(names)
        return [rule.ours for rule in self.trained if rule.ours in there and part in rule.theirs]

    def knows_elsewhere(self, target: str) -> bool:
        """Tell whether another model of the family has such a module."""
        return any(_ends_with(module, target) for module in self.elsewhere)

    def modules(self) -> list[str]:
        """Return the last words of the modules that adapters can go into, for messages."""
        return short_names(self.adapted)


def module_of(rule: Rule) -> str:
    """Return the module of a kernel in the peer's names; empty for what is no kernel."""
    return rule.theirs.removesuffix(".weight") if rule.ours.endswith(".kernel") else ""


def short_names(rules: Sequence[Rule]) -> list[str]:
    """Return each module's name as targets are written: ``Wqkv``, and ``ff.1`` where numbered."""
    found = []
    for rule in rules:
        parts = module_of(rule).split(".")
        short = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
        if short and short not in found:
            found.append(short)
    return found


def _ends_with(module: str, target: str) -> bool:
    return bool(module) and (module == target or module.endswith(f".{target}"))
