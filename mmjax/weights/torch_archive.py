"""Read ``torch.save`` files without torch: both of their containers, and what a model's tree is.

The tensors come back lazily: a ``TensorInfo`` says where the numbers lie, and the file is mapped
when they are read.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmjax.types import MMJaxError
from mmjax.weights.pickles import PickledTensor, Unpickler
from mmjax.weights.tensor_info import TensorInfo

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_torch(file: Path) -> dict[str, TensorInfo]:
    """List the tensors of a ``torch.save`` file by their flattened names.

    A training checkpoint such as Megatron's ``{"model": {...}, "args": ...}`` gives the tensors of
    its model; nested dicts are joined by dots; a leading ``module.`` (data-parallel wrappers) is
    dropped. Raises MMJaxError for damaged files and for pickles that ask for anything but tensors.
    """
    file = Path(file)
    try:
        if zipfile.is_zipfile(file):
            tree = _read_zip(file)
        else:
            tree = _read_legacy(file)
        flat = dict(_flatten(_weights_of(tree), ""))
        while flat and all(name.startswith("module.") for name in flat):
            flat = {name.removeprefix("module."): tensor for name, tensor in flat.items()}
        tensors = {name: tensor.locate(file, name) for name, tensor in flat.items()}
    except MMJaxError:
        raise
    except Exception as error:  # a hostile or damaged pickle can raise nearly anything
        raise MMJaxError(
            f"{file}: not a readable torch file ({type(error).__name__}: {error}); "
            "it is damaged or incomplete, copy it again"
        ) from error
    if not tensors:
        raise MMJaxError(f"{file}: holds no tensors; give the file with the model's weights")
    return tensors


# What a model's tensors are called in a training checkpoint, whatever stands beside them.
_STATES = ("state_dict", "model_state_dict")
_DEEPEST = 8  # so many of them one in the other; a dict that holds itself has no end


def _weights_of(tree: Any) -> Any:
    for _ in range(_DEEPEST):
        if not isinstance(tree, dict):
            break
        inner = next((k for k in (*_STATES, "model", "module") if k in tree), None)
        # A model may itself have a part called "model": its siblings are tensors or more parts.
        beside = (v for k, v in tree.items() if k != inner)
        if (
            inner is None
            or not isinstance(tree[inner], dict)
            or any(isinstance(v, PickledTensor) for v in beside)
            or (inner not in _STATES and _parts_beside(tree, inner))
        ):
            return tree
        tree = tree[inner]
    return tree


def _parts_beside(tree: dict, inner: str) -> bool:
    training = {"optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "args", "ema"}
    rest = [v for k, v in tree.items() if k != inner and k not in training]
    return any(isinstance(v, dict) and any(_flatten(v, "")) for v in rest)


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, PickledTensor]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, PickledTensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")


def _read_zip(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        members = {m.filename: m for m in archive.infolist()}
        index = next((n for n in members if n == "data.pkl" or n.endswith("/data.pkl")), None)
        if index is None:
            raise MMJaxError(f"{file}: a zip without data.pkl is no torch file")
        root = index.removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise MMJaxError(f"{file}: big-endian torch files are not supported; save it again")
        places = {}
        for name, member in members.items():
            if name.startswith(f"{root}data/"):
                places[name.removeprefix(f"{root}data/")] = _zip_place(raw, member)
        with archive.open(index) as stream:
            return Unpickler(stream, file, places).load()


def _zip_place(raw: BinaryIO, member: zipfile.ZipInfo) -> tuple[int, int, str | None]:
    if member.compress_type == zipfile.ZIP_DEFLATED:
        return 0, member.file_size, member.filename
    if member.compress_type != zipfile.ZIP_STORED:
        raise MMJaxError(
            f"{raw.name}: damaged zip, {member.filename} is compressed in way "
            f"{member.compress_type}, and torch writes 0; copy it again"
        )
    # The local header's extra field (torch's alignment padding) is not that of the directory.
    raw.seek(member.header_offset)
    header = raw.read(30)
    if header[:4] != b"PK\x03\x04":
        raise MMJaxError(f"{raw.name}: damaged zip, no header at {member.filename}; copy it again")
    name, extra = struct.unpack("<HH", header[26:30])
    start, size = member.header_offset + 30 + name + extra, os.fstat(raw.fileno()).st_size
    end = start + member.file_size
    if end > size:
        raise MMJaxError(
            f"{raw.name}: damaged zip, {member.filename} ends at byte {end} of a file of {size}; "
            "copy it again"
        )
    return start, member.file_size, None


def _read_legacy(file: Path) -> Any:
    """Read the format before torch 1.6: five pickles in a row, then the storages."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if stream.read(2) == b"PK":
            raise MMJaxError(f"{file}: a zip without its end; it is truncated, copy it again")
        stream.seek(0)
        places: dict = {}
        if Unpickler(stream, file, places).load() != _LEGACY_MAGIC:
            raise MMJaxError(
                f"{file}: neither a zip nor a legacy torch file. Load it with PyTorch and save its "
                "tensors with safetensors.torch.save_file"
            )
        Unpickler(stream, file, places).load()  # protocol
        Unpickler(stream, file, places).load()  # byte order and sizes of C types
        main = Unpickler(stream, file, places)
        tree = main.load()
        keys = Unpickler(stream, file, places).load()
        at = stream.tell()
        for key in map(str, keys):
            stream.seek(at)
            (numel,) = struct.unpack("<q", stream.read(8))
            length = numel * main.storages[key].itemsize
            places[key] = (at + 8, length, None)
            at += 8 + length
        if at > size:
            raise MMJaxError(f"{file}: {size} bytes where {at} are promised; copy it again")
    return tree
