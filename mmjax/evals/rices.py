"""RICES: solved examples whose pictures are most like the question's (Yang et al. 2022)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import user_cache
from mmjax.data.images import source_name
from mmjax.evals.few_shot import Demonstrations
from mmjax.evals.tasks import Task
from mmjax.models.clip import ImageEncoder, open_clip
from mmjax.types import BadSample, ImageSource, MMJaxError, Record

CHUNK = 1024  # pictures, about, whose directions lie in one file: what a kill loses
_BATCH = 64

Watch = Callable[[list[list[int]]], Iterable[list[int]]]
"""Passes on batches of the places of records, and shows how far it has come."""


@dataclasses.dataclass(frozen=True)
class Likeness:
    """Orders records by how much their first picture is like a question's (OpenFlamingo's RICES).

    encoder: a CLIP, of whose directions the cosine is taken. directions: float32[n, e] of the
    pictures, each once. shown: the places of the records that show each of them.
    """

    encoder: ImageEncoder
    directions: np.ndarray
    shown: Sequence[Sequence[int]]

    def order(self, record: Record) -> Iterator[int]:
        """Yield the places of the records, the most like one first, of equals the first.

        Raises MMJaxError for a record without a picture, and the BadSamples of ``open_image``.
        """
        picture = first_picture(record)
        if picture is None:
            raise MMJaxError(
                f"record {record.meta.get('id', '?')} has no picture to find examples by; leave "
                "rices out for such a task"
            )
        [direction] = self.encoder([self.encoder.images.pixels(picture)])
        rows = np.argsort(-(self.directions @ direction), kind="stable")
        return itertools.chain.from_iterable(self.shown[row] for row in rows)


def find_likeness(
    encoder: ImageEncoder,
    source: Sequence[Record],
    *,
    watch: Watch = iter,
    stop: Callable[[], bool] = lambda: False,
    folder: Path | None = None,
) -> Likeness | None:
    """See all pictures of a source with a CLIP; None where ``stop`` said so in between.

    folder: where the directions are kept, by what is in the pictures and the CLIP, default the
    user's cache: another run, or the same after a kill, reads them there. Records without a
    picture, or with an unreadable one, are left out. Raises MMJaxError where that leaves none.
    """
    folder = user_cache.folder("rices") if folder is None else folder
    places: dict[str, list[int]] = {}
    waiting: dict[str, ImageSource] = {}
    parts: list[np.ndarray] = []
    numbers = range(len(source))
    for batch in watch([[*numbers[i : i + _BATCH]] for i in numbers[::_BATCH]]):
        if stop():
            return None
        for place in batch:
            with contextlib.suppress(MMJaxError):
                picture = first_picture(source[place])
                if picture is None:
                    continue
                name = identity(picture)
                if name not in places:  # many questions may be of one picture
                    waiting[name] = picture
                places.setdefault(name, []).append(place)
        if len(waiting) >= CHUNK:
            parts.append(_directions(encoder, waiting, folder))
            waiting = {}
    if waiting:
        parts.append(_directions(encoder, waiting, folder))
    found = np.concatenate(parts) if parts else np.full((0, 1), np.nan, np.float32)
    seen = ~np.isnan(found).any(axis=1)
    if not seen.any():
        raise MMJaxError(
            f"none of the {len(source)} records that examples are taken from has a picture that "
            "can be read; mend the source of demos, or leave rices out"
        )
    shown = [one for one, ok in zip(places.values(), seen, strict=True) if ok]
    return Likeness(encoder, found[seen], shown)


def first_picture(record: Record) -> ImageSource | None:
    """Return a record's first picture, of a video its first frame; None where it has none."""
    picture = record.images[0] if record.images else None
    while isinstance(picture, list | tuple):
        picture = picture[0] if picture else None
    return picture


def identity(picture: ImageSource) -> str:
    """Name what is in a picture: of a file its path, size and time of change, else its bytes."""
    if isinstance(picture, str | os.PathLike):
        try:
            stat = os.stat(picture)
        except (OSError, ValueError):
            return source_name(picture)
        return f"{os.path.abspath(picture)} {stat.st_size} {stat.st_mtime_ns}"
    shape = getattr(picture, "shape", getattr(picture, "size", None))
    raw = picture if isinstance(picture, bytes | bytearray) else np.asarray(picture).tobytes()
    return f"{hashlib.sha256(raw).hexdigest()} {shape}"


def _directions(
    encoder: ImageEncoder, pictures: Mapping[str, ImageSource], folder: Path
) -> np.ndarray:
    """Return the directions float32[n, e] of named pictures, NaN of what cannot be read."""
    key = hashlib.sha256("\n".join((encoder.fingerprint, *pictures)).encode())
    file = folder / f"{key.hexdigest()}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent, cut short, or empty
        kept = np.load(file)
        if kept.ndim == 2 and len(kept) == len(pictures):
            return kept
    found = _see(encoder, list(pictures.values()))
    with contextlib.suppress(OSError):  # without a place to write it, nothing is kept
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as out:
            np.save(out, found)
        os.replace(out.name, file)
    return found


def _see(encoder: ImageEncoder, pictures: Sequence[ImageSource]) -> np.ndarray:
    """Return the directions float32[n, e] of pictures, NaN of those that cannot be read."""

    def pixels(picture: ImageSource) -> np.ndarray | None:
        try:
            return encoder.images.pixels(picture)
        except BadSample:
            return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes beside other threads
        read = list(pool.map(pixels, pictures))
    side = encoder.images.image_size
    blank = np.zeros((side, side, 3), np.uint8)
    parts = []
    for start in range(0, len(read), _BATCH):
        some = [blank if one is None else one for one in read[start : start + _BATCH]]
        filled = [*some, *[blank] * (_BATCH - len(some))]  # one shape, one compilation
        parts.append(encoder(filled)[: len(some)])
    found = np.concatenate(parts)
    found[[one is None for one in read]] = np.nan
    return found


def by_likeness(task: Task, demos: Demonstrations, **options: Any) -> Demonstrations | None:
    """Return a task's examples chosen by the CLIP of ``rices``; options: of ``find_likeness``."""
    encoder = open_clip(task.rices, asked=task.rices_config).load()
    likeness = find_likeness(encoder, demos.source, **options)
    return None if likeness is None else dataclasses.replace(demos, likeness=likeness)
