"""Indexes of large files, built once and kept beside them, and ids looked up in sorted arrays."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from mmjax import user_cache

Arrays = dict[str, np.ndarray]


def cached_index(
    path: Path,
    parts: Sequence[Path],
    what: str,
    build: Callable[[], Arrays],
    index_dir: str | os.PathLike | None = None,
) -> Arrays:
    """Return the arrays of ``build()``, from the cache while no part has changed.

    path: the file or folder the index belongs to; parts: the files it is made from; what: says what
    kind of index it is. A cache holds for this kind, as long as the parts' names, sizes and
    modification times do. It lies as ``.<name>.index.npz`` beside
    ``path``, in ``~/.cache/mmjax/index`` if that folder cannot be written, or in ``index_dir``.
    """
    stats = [(part, part.stat()) for part in parts]
    told = "".join(f"{p.name}\0{s.st_size}\0{s.st_mtime_ns}\0" for p, s in stats) + what
    stamp = np.frombuffer(hashlib.sha256(told.encode()).digest(), np.uint8)
    caches = _cache_paths(path, index_dir)
    for cache in caches:
        try:
            with np.load(cache) as saved:
                if np.array_equal(saved["stamp"], stamp):
                    return {str(name): saved[str(name)] for name in saved["held"]}
        except Exception:  # absent, or damaged, of which zipfile and numpy raise nearly anything
            continue  # build it again
    arrays = build()
    for cache in caches:
        if _write_cache(cache, {"stamp": stamp, "held": np.array(list(arrays)), **arrays}):
            break
    return arrays


class IdIndex:
    """Where each id stands: a sorted array of bytes, a few tens of bytes an id.

    ``names[i]`` is the i-th id in sorted order and ``order[i]`` where it stood in the file.
    """

    def __init__(self, ids: np.ndarray, order: np.ndarray | None = None):
        """Take ids as bytes (dtype S) in file order, or already sorted with their order."""
        if order is None:
            order = np.argsort(ids, kind="stable")
            ids = ids[order]
        self.names, self.order = ids, order

    def __len__(self) -> int:
        return len(self.names)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return int64[n], where each id stands in the file; -1 for one that is not there."""
        if not len(self.names) or not len(ids):
            return np.full(len(ids), -1, np.int64)
        places = np.minimum(np.searchsorted(self.names, ids), len(self.names) - 1)
        return np.where(self.names[places] == ids, self.order[places], -1)

    def in_file(self) -> np.ndarray:
        """Return the ids in the order of the file."""
        ids = np.empty_like(self.names)
        ids[self.order] = self.names
        return ids

    def twice(self) -> list[str]:
        """List the ids that stand more than once."""
        again = np.unique(self.names[1:][self.names[1:] == self.names[:-1]])
        return [name.decode() for name in again]

    def nearest(self, name: str) -> str | None:
        """Return the id most like this one among its neighbours in sorted order."""
        place = int(np.searchsorted(self.names, as_bytes([name])[0]))
        near = [x.decode() for x in self.names[max(0, place - 3) : place + 3]]
        close = difflib.get_close_matches(name, near, n=1, cutoff=0.5)
        return close[0] if close else None


def as_bytes(ids: Iterable[str]) -> np.ndarray:
    """Return ids as an array of UTF-8 bytes (dtype S), at least one byte wide."""
    # Half a surrogate pair, which JSON can hold and UTF-8 not, as the escape it was in JSON.
    encoded = [i.encode(errors="backslashreplace") for i in ids]
    return np.array(encoded, f"S{max(map(len, encoded), default=1) or 1}")


def _cache_paths(path: Path, index_dir: str | os.PathLike | None) -> list[Path]:
    """Return where the index may lie: in ``index_dir``, or beside the file, else in the cache."""
    path = path.absolute()  # "." has no name
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    name = f"{path.name}.{digest}.index.npz"
    if index_dir is not None:
        return [Path(index_dir) / name]
    return [path.with_name(f".{path.name}.index.npz"), user_cache.folder("index") / name]


def _write_cache(cache: Path, arrays: Arrays) -> bool:
    """Write an index whole or not at all; False where the folder cannot be written."""
    # Processes of several hosts may build the same index in the same folder.
    temporary = cache.with_name(f"{cache.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, cache)
    except OSError:
        with contextlib.suppress(OSError):  # where the disk is full, half a file takes room
            temporary.unlink(missing_ok=True)
        return False
    return True
