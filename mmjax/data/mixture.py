"""Mixtures: several sources, and how many records an epoch draws of each."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from mmjax.data.sources import Source
from mmjax.types import MMJaxError

Weights = Sequence[float] | Mapping[str, float] | Literal["size", "sqrt"]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Named sources and how often each is drawn from.

    weights: shares, which need not sum to 1. counts: draws of each source in one epoch of the
    mixture, whole numbers. A source is gone through in a shuffled order, and shuffled anew when it
    is through, whatever its count: no record is drawn twice before each was drawn once.
    """

    names: tuple[str, ...]
    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        sources: Source | Sequence[Source] | Mapping[str, Source] | Mixture,
        weights: Weights | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> Mixture:
        """Make a mixture of one source, a list of them, or a mapping from name to source.

        weights: a share for each source, ``"sqrt"`` for the square root of its size, or ``"size"``
        (the default): then an epoch is every record once. With shares an epoch draws as many
        records as there are. counts: draws of each source in an epoch instead; -1 for its size.
        Empty ones are none. A source may have a size to count by other than its length, ``draws``.
        Raises MMJaxError for an empty source, two of one name, and weights or counts that do not
        match the sources.
        """
        if isinstance(sources, Mixture):
            return sources
        if isinstance(sources, Mapping):
            named = {str(k): v for k, v in sources.items()}
        elif isinstance(sources, list | tuple):
            named = {f"{i}": s for i, s in enumerate(sources)}
        else:
            named = {"0": sources}
        if isinstance(sources, Mapping) and len(named) < len(sources):
            raise MMJaxError(
                f"two sources have one name among {list(map(str, sources))}; rename one"
            )
        if not named:
            raise MMJaxError("a mixture of no sources; name at least one")
        for name, source in named.items():
            if len(source) == 0:
                raise MMJaxError(f"source {name!r} is empty; remove it or check its path")
        sizes = {name: int(getattr(s, "draws", len(s))) for name, s in named.items()}
        weights, counts = check_one_given(weights, counts)
        if counts is not None:
            chosen = _counts(counts, sizes)
            shares = list(map(float, chosen))
        else:
            shares = _shares(weights, sizes)
            chosen = apportion(shares, sum(sizes.values()))
        return cls(tuple(named), tuple(named.values()), tuple(shares), tuple(chosen))

    @property
    def epoch(self) -> int:
        """Draws of one epoch."""
        return sum(self.counts)

    def pick(self, place: int) -> tuple[int, int]:
        """Return (source, how many of that source came before) of a draw; places count from 0.

        Draws are interleaved evenly, and each epoch holds exactly ``counts`` of each source.
        """
        epoch, place = divmod(place, self.epoch)
        rest = self.epoch
        for source, count in enumerate(self.counts):
            # Of the first n draws left for this source and those after it, n * count // rest are
            # its own; the others go on to the next.
            before = place * count // rest
            if (place + 1) * count // rest > before:
                return source, epoch * count + before
            place -= before
            rest -= count
        raise AssertionError("the last source takes all that is left")


def check_one_given(
    weights: Weights | None, counts: Mapping[str, int] | None
) -> tuple[Weights | None, Mapping[str, int] | None]:
    """Return both, None for an empty one; raises MMJaxError where both say how often to draw."""
    weights, counts = (None if x is None or not len(x) else x for x in (weights, counts))
    if weights is not None and counts is not None:
        raise MMJaxError("data.weights and data.counts are both given; keep one of them")
    return weights, counts


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Divide a whole number by shares: at least 1 each, largest remainders first."""
    exact = [share / sum(shares) * total for share in shares]
    counts = [max(1, math.floor(x)) for x in exact]
    # What a share lacks is counted from what it was given: a 1 given to less than 1 lacks nothing.
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: max(0, total - sum(counts))]:
        counts[i] += 1
    return counts


def by_source(what: str, given: Any, names: Sequence[str]) -> list[Any]:
    """Return a value for each source: of a mapping by name, else the same for all."""
    if not isinstance(given, Mapping):
        return [given] * len(names)
    return [_matched(what, given, dict.fromkeys(names))[name] for name in names]


def _shares(weights: Weights | None, sizes: Mapping[str, int]) -> list[float]:
    """Return a share for each source."""
    by_size = {"size": float, "sqrt": math.sqrt}
    if weights is None or isinstance(weights, str):
        share = by_size.get(weights or "size")
        if share is not None:
            return [share(size) for size in sizes.values()]
        raise MMJaxError(f"weights {weights!r} is unknown; give 'size', 'sqrt', or shares by name")
    if isinstance(weights, Mapping):
        weights = [_matched("weights", weights, sizes)[name] for name in sizes]
    if len(weights) != len(sizes):
        raise MMJaxError(f"{len(weights)} weights for {len(sizes)} sources; give one each")
    if not all(w > 0 and math.isfinite(w) for w in weights):
        shown = ", ".join(f"{n} {w}" for n, w in zip(sizes, weights, strict=True))
        raise MMJaxError(f"weights ({shown}) must all be positive; drop a source instead")
    return [float(w) for w in weights]


def _counts(counts: Mapping[str, int], sizes: Mapping[str, int]) -> list[int]:
    """Return the draws of each source; -1 is its size."""
    found = _matched("counts", counts, sizes)
    wrong = {n: c for n, c in found.items() if not isinstance(c, Integral) or (c < 1 and c != -1)}
    if wrong:
        raise MMJaxError(
            f"counts {wrong}: each is how many records an epoch draws, at least 1, or -1 for all; "
            "drop a source that is not to be drawn"
        )
    return [sizes[n] if found[n] == -1 else int(found[n]) for n in sizes]


def _matched(what: str, given: Mapping, sizes: Mapping) -> Mapping:
    """Raise MMJaxError unless the names are those of the sources, naming the nearest."""
    if set(given) == set(sizes):
        return given
    strange = sorted(set(given) - set(sizes))
    if not strange:
        hint = f"give one for {min(set(sizes) - set(given))!r} too"
    elif near := difflib.get_close_matches(strange[0], sizes, n=1):
        hint = f"did you mean {near[0]!r} by {strange[0]!r}?"
    else:
        hint = f"there is no source {strange[0]!r}"
    raise MMJaxError(f"{what} for {sorted(given)}, but sources {sorted(sizes)}; {hint}")
