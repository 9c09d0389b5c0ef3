"""Mixtures: several sources drawn from by weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from mmjax.data.sources import Source
from mmjax.types import MMJaxError


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Named sources and how often each is drawn from; weights need not sum to 1."""

    names: tuple[str, ...]
    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(
        cls,
        sources: Source | Sequence[Source] | Mapping[str, Source] | Mixture,
        weights: Sequence[float] | Mapping[str, float] | None = None,
    ) -> Mixture:
        """Make a mixture of one source, a list of them, or a mapping from name to source.

        Without weights each source counts by its length, so that all records are equally likely.
        Raises MMJaxError for an empty source, or weights that do not match the sources.
        """
        if isinstance(sources, Mixture):
            return sources
        if isinstance(sources, Mapping):
            named = {str(k): v for k, v in sources.items()}
        elif isinstance(sources, list | tuple):
            named = {f"{i}": s for i, s in enumerate(sources)}
        else:
            named = {"0": sources}
        for name, source in named.items():
            if len(source) == 0:
                raise MMJaxError(f"source {name!r} is empty; remove it or check its path")
        if isinstance(weights, Mapping):
            if set(weights) != set(named):
                raise MMJaxError(f"weights for {sorted(weights)}, but sources {sorted(named)}")
            weights = [weights[name] for name in named]
        if weights is None:
            weights = [len(s) for s in named.values()]
        if not named or len(weights) != len(named):
            raise MMJaxError(f"{len(weights)} weights for {len(named)} sources; give one each")
        if not all(w > 0 and math.isfinite(w) for w in weights):
            raise MMJaxError(f"weights {list(weights)} must all be positive; drop a source instead")
        return cls(tuple(named), tuple(named.values()), tuple(float(w) for w in weights))
