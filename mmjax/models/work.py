"""What a model multiplies in a forward pass, stretch by stretch from its input to its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Work:
    """A stretch of the way from the input to the loss, and its FLOPs in a forward pass.

    maps: FLOPs of products with parameters, by a glob pattern of their dotted names; 0 for those
    that multiply next to nothing, such as norms and tables that are looked up. scores: FLOPs of
    products of activations with each other, as in attention.
    """

    maps: Mapping[str, float]
    scores: float = 0.0

    @property
    def flops(self) -> float:
        """FLOPs of all of it."""
        return sum(self.maps.values()) + self.scores

    def beside(self, other: Work) -> Work:
        """Return the stretch in which both stand among each other, each behind some of the other.

        Their patterns differ.
        """
        return Work({**self.maps, **other.maps}, self.scores + other.scores)


def forward_flops(way: Iterable[Work]) -> float:
    """Return the FLOPs of a forward pass."""
    return sum(work.flops for work in way)
