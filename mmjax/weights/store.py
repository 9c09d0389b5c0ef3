"""Write and read a tree of arrays in Orbax's on-disk format, one chunk at a time.

Orbax saves arrays that are whole in memory; a stacked parameter of a large model is itself bigger
than the host should hold. This writes the same files (Zarr 3 arrays and the tree's metadata) chunk
by chunk, so that ``orbax.checkpoint`` restores them like its own.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from mmjax.types import MMJaxError
from mmjax.weights.operations import Shape
from mmjax.weights.reader import partial_hint
from mmjax.weights.writer import cannot_write

ITEM = "state"  # the name Orbax v1 gives to the only tree of a checkpoint
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
# A weight's bits are close to noise: compressing them costs minutes and saves a few percent.
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}]


class StoreWriter:
    """Arrays that are written block by block; ``close`` writes what makes the folder readable."""

    def __init__(self, folder: Path, arrays: Mapping[str, tuple[Shape, np.dtype, Shape]]):
        """arrays: our dotted path -> (shape, dtype, chunk shape)."""
        self.folder, self.arrays = Path(folder), dict(arrays)
        (self.folder / ITEM).mkdir(parents=True)
        self.started = time.time_ns()
        self._open: tuple[str, Any] | None = None
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    def write(self, path: str, index: tuple[slice, ...], block: np.ndarray) -> None:
        """Write one block; it should cover whole chunks. Raises MMJaxError on a full disk."""
        try:
            if self._open is None or self._open[0] != path:
                shape, dtype, chunk = self.arrays[path]
                self._open = (path, self._create(path, shape, dtype, chunk))
            writing = self._open[1][index].write(block)
            try:
                writing.result()
            except KeyboardInterrupt:
                # Its threads write on, and would make anew the folder that is then removed.
                writing.exception()
                raise
        except ValueError as error:
            raise cannot_write(self.folder, error) from error

    def _create(self, path: str, shape: Shape, dtype: np.dtype, chunk: Shape):
        spec = {
            "driver": "zarr3",
            "kvstore": _files(self.folder / ITEM / path),
            "metadata": {
                "shape": list(shape),
                "data_type": np.dtype(dtype).name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
                "codecs": _CODECS,
            },
            # A block of zeros is a block like any other: without it Orbax sees a missing chunk.
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, create=True, context=self._context).result()

    def close(self) -> None:
        tree = {}
        for path, (shape, _, _) in self.arrays.items():
            names = tuple(path.split("."))
            tree[str(names)] = {
                "key_metadata": [{"key": name, "key_type": 2} for name in names],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(shape),
                },
            }
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self.folder / ITEM / "_METADATA").write_text(json.dumps(metadata), "utf-8")
        checkpoint = {
            "item_handlers": {ITEM: _HANDLER},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self.started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        }
        (self.folder / "_CHECKPOINT_METADATA").write_text(json.dumps(checkpoint), "utf-8")
        (self.folder / "orbax.checkpoint").touch()


class StoreReader:
    """A tree of arrays on disk, whoever wrote it, Orbax or this module; a Reader."""

    def __init__(self, folder: str | Path):
        """folder: the checkpoint or the tree's own folder.

        Raises MMJaxError when it is not there or not finished.
        """
        folder = Path(folder)
        for tree in (folder / ITEM, folder / "pytree", folder / "params", folder):
            if (tree / "_METADATA").is_file():
                break
        else:
            raise MMJaxError(
                f"{folder}: no finished Orbax tree (its _METADATA is missing); it was cut off "
                f"while being written, make it again{partial_hint(folder)}"
            )
        self.folder, self.files = tree, [tree / "_METADATA"]
        metadata = _metadata(tree)
        self._names = _names(tree, metadata)
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        self._ocdbt = (tree / "manifest.ocdbt").is_file()
        # Where zeros are written like other numbers, what is not there was lost.
        self._complete = bool(metadata.get("store_array_data_equal_to_fill_value"))
        self._stores: dict[str, Any] = {}

    def keys(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, key: str) -> Shape:
        return tuple(self._store(key).shape)

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(self._store(key).dtype.numpy_dtype)

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        store = self._store(key)
        try:
            return store[index].read().result()
        except ValueError as error:
            raise self._damaged(key, error) from error

    def nbytes(self) -> int:
        return sum(math.prod(self.shape(k)) * self.dtype(k).itemsize for k in self.keys())

    def _store(self, key: str):
        if key not in self._stores:
            name = self._names[key]
            if self._ocdbt:
                kvstore = {"driver": "ocdbt", "base": _files(self.folder), "path": f"{name}/"}
            else:
                kvstore = _files(self.folder / name)
            context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
            spec = {
                "driver": self._driver,
                "kvstore": kvstore,
                "fill_missing_data_reads": not self._complete,
            }
            try:
                store = ts.open(spec, read=True, context=context).result()
            except ValueError as error:
                raise self._damaged(key, error) from error
            self._stores[key] = store
        return self._stores[key]

    def _damaged(self, key: str, error: Exception) -> MMJaxError:
        return MMJaxError(
            f"{self.folder}: the array {self._names[key]!r} cannot be read; the folder is damaged, "
            f"copy it anew or make it again ({str(error)[:200]})"
        )


def _files(folder: Path) -> dict[str, str]:
    """Return where a folder is, for tensorstore, which refuses a path that has .. in it.

    Other paths stay as they are: /proc/PID/root leads where its own links do not.
    """
    plain = os.path.realpath(folder) if ".." in folder.parts else os.path.abspath(folder)
    return {"driver": "file", "path": f"{plain}/"}


def _names(tree: Path, metadata: dict[str, Any]) -> dict[str, str]:
    """Return the arrays' folders by dotted path; raises MMJaxError where a tree's file lacks it."""
    found = {}
    try:
        for entry in metadata["tree_metadata"].values():
            if entry["value_metadata"].get("skip_deserialize"):
                continue
            names = [str(part["key"]) for part in entry["key_metadata"]]
            # nnx keeps the array of a Variable under "value".
            path = names[:-1] if names[-1] in ("value", "raw_value") else names
            found[".".join(path)] = ".".join(names)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise MMJaxError(
            f"{tree / '_METADATA'}: not that of an Orbax tree ({error!r}); the folder is damaged, "
            "copy it anew or make it again"
        ) from error
    return found


def _metadata(tree: Path) -> dict[str, Any]:
    """Return what a tree's _METADATA says; raises MMJaxError where it is no JSON."""
    try:
        return json.loads((tree / "_METADATA").read_text("utf-8"))
    except ValueError as error:
        raise MMJaxError(
            f"{tree / '_METADATA'}: not JSON ({error}); the folder is damaged, "
            "copy it anew or make it again"
        ) from error
