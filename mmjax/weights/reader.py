"""Open weight files and folders lazily: names, shapes and dtypes first, numbers when asked.

A reader is anything with ``keys()``, ``shape(key)``, ``dtype(key)`` and ``read(key, index)``.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mmjax.types import MMJaxError
from mmjax.weights.tensor_info import TensorInfo
from mmjax.weights.torch_archive import read_torch

SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_LFS_POINTER = b"version https://git-lfs"
# Files that lie beside the weights and hold none.
_NOT_WEIGHTS = re.compile(
    r"training_args|optimizer|scheduler|rng_state|scaler|\.index\.json$"
    r"|^non_lora_trainables\."  # whole tensors beside an adapter, read with it
)


class Reader(Protocol):
    """Named tensors that are read one slice at a time."""

    files: list[Path]

    def keys(self) -> Iterable[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> np.dtype: ...
    def read(self, key: str, index: Any = ...) -> np.ndarray: ...


class FileReader:
    """Tensors of safetensors and torch files, mapped into memory when they are read."""

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        self.tensors = dict(tensors)
        self.files = sorted({info.file for info in self.tensors.values()})

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.tensors[key].shape

    def dtype(self, key: str) -> np.dtype:
        return self.tensors[key].dtype

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        """Return a view of the file; only the pages that are touched are read."""
        return self.tensors[key].read()[index]


class Renamed:
    """Another reader's tensors under other names; a name mapped to None is hidden."""

    def __init__(self, reader: Reader, rename: Callable[[str], str | None]):
        self.reader, self.files = reader, reader.files
        names = ((rename(old), old) for old in reader.keys())  # noqa: SIM118
        self.names = {new: old for new, old in names if new is not None}

    def keys(self) -> Iterable[str]:
        return self.names.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.reader.shape(self.names[key])

    def dtype(self, key: str) -> np.dtype:
        return self.reader.dtype(self.names[key])

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        return self.reader.read(self.names[key], index)


class Overlay:
    """Several readers as one; a later reader's tensor hides an earlier one of the same name."""

    def __init__(self, *readers: Reader):
        self.owner = {key: reader for reader in readers for key in reader.keys()}  # noqa: SIM118
        self.files = [file for reader in readers for file in reader.files]

    def keys(self) -> Iterable[str]:
        return self.owner.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.owner[key].shape(key)

    def dtype(self, key: str) -> np.dtype:
        return self.owner[key].dtype(key)

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        return self.owner[key].read(key, index)


def open_reader(path: str | Path) -> FileReader:
    """Open a weight file or a folder of them: ``.safetensors``, ``.bin``, ``.pt``, ``.pth``.

    In a folder, as in transformers, ``model.safetensors`` is taken, else the shards that its index
    names, else the same of ``pytorch_model.bin``: before variants and whatever lies beside them.
    Other names have to leave no choice; without an index, numbered shards must be complete, and
    safetensors win over pickles. Raises MMJaxError naming the file and the fix.
    """
    path = Path(path)
    if path.is_file():
        return FileReader(_read_file(path))
    if not path.is_dir():
        raise MMJaxError(f"{path}: no such file or folder{absent_hint(path)}")
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        for key, info in _read_file(file).items():
            if key in tensors:
                raise MMJaxError(
                    f"{path}: {key!r} stands in both {tensors[key].file.name} and {file.name}; "
                    "keep the shards of one model only"
                )
            tensors[key] = info
    return FileReader(tensors)


def absent_hint(path: Path) -> str:
    """Say what a path that is not there may be: half-written, not yet, on the hub, or nothing."""
    hint = partial_hint(path)
    if not hint and path.name == "model" and (path.parent / "checkpoints").is_dir():
        return (
            "; a run writes it when it ends, and python -m convert_weights.from_run "
            f"{path.parent} DST makes a model of its checkpoint before"
        )
    if hint or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        return hint
    return (
        "; if this is a name on the Hugging Face hub, fetch it first, nothing is downloaded "
        f"here: hf download {path} --local-dir {path.name}"
    )


def partial_hint(path: Path) -> str:
    """Say that a half-written conversion of this name lies beside it, or nothing."""
    left = sorted(path.parent.glob(f"{path.name}.partial-*")) if path.name else []
    if not left:
        return ""
    return (
        f"; {left[0].name} beside it is a conversion that is still running or was killed: "
        "if none is running, delete it and run the conversion again"
    )


def _weight_files(folder: Path) -> list[Path]:
    for usual in ("model.safetensors", "pytorch_model.bin"):
        if (folder / usual).is_file():
            return [folder / usual]
        if (index := _index(folder, f"{usual}.index.json")) is not None:
            return _indexed_files(index)
    for suffixes in ((".safetensors",), _TORCH_SUFFIXES):
        files = [
            file
            for file in sorted(folder.iterdir())
            if file.suffix in suffixes and not _NOT_WEIGHTS.search(file.name)
        ]
        # An adapter may lie beside a whole model: it is no part of it.
        whole = [file for file in files if not file.name.startswith("adapter_model")]
        files = whole or files
        if files:
            return _complete_shards(folder, files)
    raise MMJaxError(
        f"{folder}: holds no weights (*.safetensors, *.bin, *.pt, *.pth); is the download complete?"
    )


def _index(folder: Path, usual: str) -> Path | None:
    """Return the index file of this kind; of several, such as those of variants, the usual one."""
    found = sorted(folder.glob(f"*{usual[usual.index('.') :]}"))
    if len(found) > 1 and folder / usual not in found:
        raise MMJaxError(
            f"{folder}: {', '.join(f.name for f in found[:4])}: which one is the model? "
            "Leave one in the folder"
        )
    return folder / usual if folder / usual in found else next(iter(found), None)


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("its weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MMJaxError(f"{index}: not a weight index ({error!r}); download it again") from error
    unsafe = [name for name in names if Path(name).name != name]
    if unsafe:
        raise MMJaxError(f"{index}: names a file outside its folder: {unsafe[0]!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise MMJaxError(
            f"{index}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; "
            "download them into the same folder"
        )
    return [index.parent / name for name in names]


def _complete_shards(folder: Path, files: list[Path]) -> list[Path]:
    if len(files) == 1 and not re.search(r"-of-\d+", files[0].stem):
        return files
    matches = [re.fullmatch(r"(.*?)-?(\d+)-of-(\d+)", file.stem) for file in files]
    if None in matches or len({(match[1], match[3]) for match in matches}) > 1:
        raise MMJaxError(
            f"{folder}: {', '.join(f.name for f in files[:4])}: which one is the model? "
            "Give the file itself, or leave one model in the folder"
        )
    numbers, total = {int(match[2]) for match in matches}, int(matches[0][3])
    if len(numbers) != total:
        raise MMJaxError(
            f"{folder}: {len(numbers)} of {total} shards are there; download the missing ones"
        )
    return files


def _read_file(file: Path) -> dict[str, TensorInfo]:
    """List the tensors of one file; raises MMJaxError for one that cannot be read."""
    if file.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise MMJaxError(
            f"{file}: weights are read from .safetensors, .bin, .pt or .pth, not {file.suffix!r}"
        )
    try:
        with open(file, "rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise MMJaxError(
                    f"{file}: a pointer of git-lfs, not the weights it stands for; run "
                    "git lfs pull in its folder, or download the file"
                )
        return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    except OSError as error:
        where = f", a link to {os.path.realpath(file)}" if file.is_symlink() else ""
        raise MMJaxError(
            f"{file}{where} cannot be read ({error.strerror}); mend its path or rights, or "
            "download it again"
        ) from error


def read_safetensors(file: Path) -> dict[str, TensorInfo]:
    """List the tensors of a safetensors file.

    Raises MMJaxError when the header and the size of the file do not agree.
    """
    file = Path(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise MMJaxError(
                f"{file}: {size} bytes are fewer than its header; the file is truncated, "
                "download it again"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {k: _entry(file, 8 + length, v) for k, v in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MMJaxError(
                f"{file}: its header is not that of a safetensors file ({error!r}); "
                "download it again"
            ) from error
    for key, info in tensors.items():
        if info.offset + info.nbytes > size:
            raise MMJaxError(
                f"{file}: {key!r} ends at byte {info.offset + info.nbytes} of a file of {size}; "
                "the file is truncated, download it again"
            )
    return tensors


def _entry(file: Path, base: int, entry: dict) -> TensorInfo:
    start, end = entry["data_offsets"]
    dtype = SAFETENSORS_DTYPES[entry["dtype"]]
    info = TensorInfo(file, base + start, tuple(map(int, entry["shape"])), dtype)
    if start < 0 or end - start != info.nbytes or min(info.shape, default=0) < 0:
        raise ValueError(f"{entry} does not add up")
    return info
