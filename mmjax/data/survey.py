"""Go through the records of a mixture as training would, and say what it would drop and why.

Numpy only: ``load`` is training's own loader (``mmjax.data.examples.LoadExample``), handed in.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmjax.data.limits import spread
from mmjax.data.mixture import Mixture
from mmjax.data.packing import example_sizes
from mmjax.data.skips import BY_CHOICE, Skip
from mmjax.data.sources import Source
from mmjax.types import BadSample, Example, ImageSource, MMJaxError

Loader = Callable[[tuple[int, int, int]], Example | Skip]

_SHOWN = 3  # bad samples kept of each reason
_WINDOW = 256  # records under way at once


@dataclasses.dataclass
class SourceReport:
    """What was found in one source.

    records: its length; draws: of an epoch of the mixture. sizes: int64[good, 3], the tokens,
    patches and targets of each good record. counts: bad records by reason; first: the messages of
    the first few of each. repeated: ids met more than once. images: of the good records.
    """

    name: str
    records: int
    draws: int
    sizes: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    repeated: list[str] = dataclasses.field(default_factory=list)
    images: int = 0

    @property
    def good(self) -> int:
        """How many records can be trained on."""
        return len(self.sizes)

    @property
    def checked(self) -> int:
        """How many records were looked at."""
        return self.good + sum(self.counts.values())

    @property
    def bad_share(self) -> float:
        """The share of the records looked at that training would drop."""
        return 1 - self.good / self.checked if self.checked else 0.0

    @property
    def broken_share(self) -> float:
        """The same without what the source's own settings leave out, see ``skips.BY_CHOICE``."""
        broken = sum(n for reason, n in self.counts.items() if reason not in BY_CHOICE)
        return broken / self.checked if self.checked else 0.0

    def quantile(self, column: int, q: float) -> int:
        """Return a quantile of the tokens (0), patches (1) or targets (2) of the good records."""
        if not self.sizes:
            return 0
        return int(np.quantile(np.array(self.sizes)[:, column], q, method="higher"))

    def mean_tokens(self) -> float:
        """Return the mean length of the good records."""
        return float(np.mean([size[0] for size in self.sizes])) if self.sizes else 0.0


def survey(
    mixture: Mixture, load: Loader, limit: int | None = None, threads: int = 1
) -> Iterator[SourceReport]:
    """Load every record of every source as in the first epoch; yields after each record.

    limit: look at no more than this many of a source, spread evenly. threads: records loaded at
    once. What is yielded is the source's report as it stands, the same object until the next.
    """
    with ThreadPoolExecutor(threads) as pool:
        for number, (name, source) in enumerate(zip(mixture.names, mixture.sources, strict=True)):
            report = SourceReport(name, len(source), mixture.counts[number])
            seen: set[int] = set()
            chosen = spread(len(source), limit)
            for start in range(0, len(chosen), _WINDOW):
                draws = [(number, i, 0) for i in chosen[start : start + _WINDOW]]
                for found in pool.map(lambda draw: _load(load, draw, mixture), draws):
                    _note(report, found, seen)
                    yield report


def fingerprint(source: Source, records: int = 8) -> str:
    """Hash some records of a source, spread evenly: two that differ there hold other data.

    Of images that are files it is the names and sizes.
    """
    digest = hashlib.sha256()
    for index in spread(len(source), records):
        try:
            record = source[index]
        except BadSample as error:
            digest.update(error.reason.encode() + b"\0")
            continue
        said = [(m.role, m.text) for m in record.messages]
        digest.update(repr((str(record.meta.get("id")), said)).encode("utf-8", "backslashreplace"))
        for image in record.images:
            for one in image if isinstance(image, list | tuple) else (image,):
                digest.update(_content(one) + b"\0")
    return digest.hexdigest()[:16]


def _content(image: ImageSource) -> bytes:
    """Return what an image is told by: its bytes, or the name and size of its file."""
    if isinstance(image, str | os.PathLike):
        size = os.path.getsize(image) if os.path.isfile(image) else -1
        return f"{os.fspath(image)} {size}".encode("utf-8", "surrogateescape")
    return image if isinstance(image, bytes) else np.asarray(image).tobytes()


def require_some_good(mixture: Mixture, load: Loader, tries: int = 64) -> None:
    """Raise MMJaxError naming a source of which nothing can be trained on.

    A source passes with its first good record, so this reads one record of most; it looks at
    ``tries`` of them, spread evenly, before it gives up. All answers longer than a row is one such
    mistake, a wrong image folder another.
    """
    for number, (name, source) in enumerate(zip(mixture.names, mixture.sources, strict=True)):
        report = SourceReport(name, len(source), mixture.counts[number])
        for index in spread(len(source), tries):
            found = load((number, index, 0))
            if not isinstance(found, Skip):
                break
            _note(report, found, set())
        else:
            counts = ", ".join(f"{reason}: {n}" for reason, n in report.counts.most_common())
            lines = [f"  {reason}: {first[0]}" for reason, first in report.first.items()]
            raise MMJaxError(
                f"source {name!r}: {report.checked} of {report.checked} training samples were "
                f"unusable ({counts}). Mend the data or the settings; python -m mmjax.data.check "
                "goes through all of it\n" + "\n".join(lines)
            )


def _load(load: Loader, draw: tuple[int, int, int], mixture: Mixture) -> Example | Skip:
    """Load one record; what training would stop at is told like what it would skip."""
    try:
        return load(draw)
    except Exception as error:  # any error of any source: it belongs into the table
        source, index, _ = draw
        message = f"record {index}: {type(error).__name__}: {error} (this would stop the run)"
        return Skip(str(index), mixture.names[source], index, "stops_training", message)


def _note(report: SourceReport, found: Example | Skip, seen: set[int]) -> None:
    """Write one record into the report."""
    if isinstance(found, Skip):
        report.counts[found.reason] += 1
        first = report.first.setdefault(found.reason, [])
        if len(first) < _SHOWN:
            first.append(found.message)
        name: Any = found.id
    else:
        report.sizes.append(example_sizes(found))
        origin = found["origin"]
        report.images += origin.images
        name = origin.id
    key = hash(name)  # millions of ids: the numbers alone are kept
    if key in seen and name not in report.repeated and len(report.repeated) < 100:
        report.repeated.append(name)
    seen.add(key)
