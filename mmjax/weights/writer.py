"""Write models: safetensors shards with an index, into a folder that appears whole or not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.partial import MARKER, begin, discard, partial_of, replaced_by
from mmjax.types import MMJaxError
from mmjax.weights.reader import SAFETENSORS_DTYPES, absent_hint
from mmjax.weights.rules import Tensor

SHARD_BYTES = 5_000_000_000
_FOLDERS = ("params",)  # all that a conversion makes
_MODEL_FILES = ("config.json", "adapter_config.json", MARKER, *_FOLDERS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


class Arrays:
    """Arrays in memory, possibly sharded over devices, as a Reader of our parameters."""

    def __init__(self, arrays: Mapping[str, Any]):
        self.arrays = dict(arrays)
        self.files: list[Path] = []

    def keys(self) -> Iterable[str]:
        return self.arrays.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.arrays[key].shape)

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(self.arrays[key].dtype)

    def piece(self, key: str, index: Any) -> Any:
        """Return one slice where it lies."""
        return self.arrays[key][index]

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        """Bring one slice to the host; of arrays spread over processes, each asks for the same."""
        mesh = getattr(getattr(self.arrays[key], "sharding", None), "mesh", None)
        if mesh is None:
            return np.asarray(self.piece(key, index))
        import jax

        with jax.set_mesh(mesh):  # slicing is a program of the array's devices, not of the caller's
            part = self.piece(key, index)
            return np.asarray(part if part.is_fully_addressable else everywhere(part, mesh))


def everywhere(part: Any, mesh: Any) -> Any:
    """Return an array of a mesh whole on each of its devices; compiled once for each shape."""
    import jax

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(_same, out_shardings=whole)(part)


def _same(x: Any) -> Any:  # one function: jit looks its programs up by it
    return x


def check_destination(destination: Path, overwrite: bool) -> Path:
    """Return the folder that will be written; raises MMJaxError where ``atomic_folder`` would."""
    if destination.exists() and not overwrite:
        raise MMJaxError(
            f"{destination} exists; give another destination, or --overwrite to replace it"
        )
    target = Path(os.path.realpath(destination))
    if os.path.ismount(target):
        raise MMJaxError(f"{destination}: a mounted disk cannot be replaced; give a folder in it")
    if target.exists():
        _refuse_others(destination, target)
    return target


@contextlib.contextmanager
def atomic_folder(
    destination: str | Path, *, overwrite: bool = False, nbytes: int = 0
) -> Iterator[Path]:
    """Give a folder to fill that takes its final name only when the block ends well.

    A killed process leaves ``NAME.partial-PID`` with a marker inside, which nothing loads and the
    next writer of NAME removes. A destination that is a link stays one: what it points to is
    written. nbytes: what is going to be written, as far as known.
    Raises MMJaxError when the destination exists, unless ``overwrite``: then the old folder stays
    until the new one is whole, and has to be a model's or empty; and when the disk has no room for
    it, is full or cannot be written.
    """
    destination = Path(destination)
    target = check_destination(destination, overwrite)
    with contextlib.ExitStack() as held:
        try:
            partial = begin(target, held)
            _require_room(partial, nbytes)
        except OSError as error:
            held.close()  # on NFS a folder with an open file stays
            shutil.rmtree(partial_of(target), ignore_errors=True)
            raise cannot_write(destination, error) from error
        try:
            yield partial
        except BaseException as error:
            held.close()
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise cannot_write(destination, error) from error
            raise
        (partial / MARKER).unlink()
    if target.exists():
        old = replaced_by(target)
        os.rename(target, old)
        os.rename(partial, target)
        discard(old)
    else:
        os.rename(partial, target)


def _require_room(folder: Path, nbytes: int) -> None:
    """Raise OSError where so many bytes do not fit, rather than when most of them are written."""
    disk = shutil.disk_usage(folder)
    if disk.total and nbytes > disk.free:  # some network file systems say nothing
        need, free = (f"{n / 1e9:.3g} GB" for n in (nbytes, disk.free))
        raise OSError(errno.ENOSPC, f"it takes {need}, and {free} are free on its disk")


def _refuse_others(destination: Path, target: Path) -> None:
    """Raise MMJaxError for what was no model: --overwrite would delete all that is in it."""
    if not target.is_dir():
        why = "is a file"
    else:
        found = list(target.iterdir())
        why = "holds no model" if found and not any(map(_is_models, found)) else ""
        if folders := sorted(f.name for f in found if f.is_dir() and f.name not in _FOLDERS):
            more = ", ..." if len(folders) > 3 else ""
            why = f"holds folders that are no part of a model ({', '.join(folders[:3])}{more})"
    if why:
        raise MMJaxError(
            f"{destination} {why}, and --overwrite would delete it; give another destination, or "
            "delete it yourself"
        )


def _is_models(path: Path) -> bool:
    return path.name in _MODEL_FILES or path.suffix in (".safetensors", ".bin", ".pt", ".pth")


def cannot_write(destination: str | Path, error: Exception) -> MMJaxError:
    """Return the error of a destination that is full or may not be written."""
    # Of tensorstore's long messages the last words are the operating system's.
    why = error.strerror if isinstance(error, OSError) else str(error).split(" [")[0][-160:]
    return MMJaxError(
        f"{destination} cannot be written ({why}); make room there, or give another destination. "
        "Nothing was changed"
    )


def refuse_incomplete(folder: Path) -> None:
    """Raise MMJaxError for a folder that is not there or was never finished."""
    if not folder.exists():
        raise MMJaxError(f"{folder}: no such file or folder{absent_hint(folder)}")
    if folder.is_dir() and (folder / MARKER).exists():
        raise MMJaxError(
            f"{folder}: a half-written conversion, its writer was killed or is still at work; "
            "delete it and run the conversion again"
        )


def write_shards(
    folder: Path,
    tensors: Sequence[Tensor],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write tensors as ``stem.safetensors`` or as numbered shards with an index.

    One tensor is in memory at a time. Returns the names of the files.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [
            f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, progress=progress)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors)},
            "weight_map": {
                t.key: name for name, shard in zip(names, shards, strict=True) for t in shard
            },
        }
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", "utf-8"
        )
    return names


def write_safetensors(
    file: Path, tensors: Sequence[Tensor], *, progress: Callable[[int], None] | None = None
) -> None:
    """Write one safetensors file, tensor after tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for tensor in tensors:
        header[tensor.key] = {
            "dtype": _CODES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make())
            stream.write(array.reshape(-1).view(np.uint8).data)
            del array  # or it would live on while the next one is made
            if progress is not None:
                progress(tensor.nbytes)
