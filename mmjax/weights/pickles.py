"""Read ``torch.save`` files without torch and without running anything a pickle names.

The tensors come back lazily: a ``TensorInfo`` says where the numbers lie, and the file is mapped
when they are read. Only the functions that rebuild a tensor are allowed, and they are our own;
any other global is refused by name before it is looked up.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mmjax.types import MMJaxError

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}
_DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
# Found beside the weights in training checkpoints (Megatron's arguments and random state). They
# are replaced by an empty object: nothing of theirs is imported or called.
_INERT = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in a file.

    offset: of its first number, in bytes. strides: in numbers; None means row-major.
    member: name of a compressed zip member that has to be unpacked to reach it, else None.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None
    member: str | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Return the tensor as a read-only view of the mapped file; nothing is read before use."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        strides = self.strides or _row_major(self.shape)
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        size = reach * self.dtype.itemsize
        if self.member is None:
            raw = np.memmap(self.file, np.uint8, "r", self.offset, (size,))
        else:
            with zipfile.ZipFile(self.file) as archive:
                data = archive.read(self.member)
            raw = np.frombuffer(data, np.uint8, size, self.offset)
        # A plain ndarray: np.memmap's own bookkeeping on every slice is slow.
        flat = np.asarray(raw).view(np.ndarray).view(self.dtype)
        steps = tuple(s * self.dtype.itemsize for s in strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    dtype: np.dtype
    numel: int
    key: str
    places: dict  # key -> (offset, bytes, member); filled later in the legacy format


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple
    dtype: np.dtype

    def locate(self, file: Path, name: str) -> TensorInfo:
        """Return where the tensor lies; raises MMJaxError when it reaches beyond its storage."""
        item = self.dtype.itemsize
        numbers = (self.offset, *self.shape, *self.strides)
        whole = all(isinstance(n, int) and n >= 0 for n in numbers)
        place = self.storage.places.get(self.storage.key)
        if place is None or not whole or len(self.shape) != len(self.strides):
            raise MMJaxError(f"{file}: tensor {name!r} has no storage in the file; it is damaged")
        reach = 0
        if 0 not in self.shape:
            pairs = zip(self.shape, self.strides, strict=True)
            reach = (self.offset + 1 + sum((n - 1) * s for n, s in pairs)) * item
        start, size, member = place
        if reach > size:
            raise MMJaxError(
                f"{file}: tensor {name!r} needs {reach} bytes of a storage of {size}; "
                "the file is truncated or damaged, copy it again"
            )
        strides = None if self.strides == _row_major(self.shape) else self.strides
        start += self.offset * item
        return TensorInfo(file, start, self.shape, self.dtype, strides, member)


class _Inert:
    """What stands for an allowed object of no use to us."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _Scripted(dict):
    """A module of a TorchScript archive, as OpenAI publishes CLIP: its attributes by name.

    The archive's code stays unread.
    """

    def __setstate__(self, state):
        self.update(state)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return _Tensor(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _rebuild_tensor_v3(storage, offset, shape, strides, grad, hooks, dtype, *_):
    return _Tensor(storage, offset, tuple(shape), tuple(strides), np.dtype(_DTYPES[dtype]))


def _rebuild_parameter(data, *_):
    return data


def _same(value, *_):
    return value


_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.jit._pickle", f"build_{kind}list"): _same for kind in ("int", "double", "bool")},
    ("torch.jit._pickle", "build_tensorlist"): _same,
    ("torch.jit._pickle", "restore_type_tag"): _same,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *a: {},
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    **{("torch", name): name for name in (*STORAGES, *_DTYPES)},
    ("torch.storage", "UntypedStorage"): "UntypedStorage",
    **dict.fromkeys(_INERT, _Inert),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, file: Path, places: dict):
        super().__init__(stream, encoding="utf-8")
        self.file, self.places, self.storages = file, places, {}

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] == "__torch__":
            return _Scripted
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise MMJaxError(
                f"{self.file}: refused: its pickle asks for {module}.{name}, which is not part of "
                "a tensor, and nothing of the file was run. If you trust its source, load it with "
                "PyTorch and save its tensors with safetensors.torch.save_file"
            ) from None

    def persistent_load(self, pid):
        kind, storage, key, _, numel, *rest = pid
        if kind != "storage" or storage not in STORAGES or any(rest):
            raise MMJaxError(f"{self.file}: holds a storage of an unknown kind, {pid[:2]!r}")
        key = str(key)
        dtype = np.dtype(STORAGES[storage])
        self.storages[key] = dtype
        return _Storage(dtype, numel, key, self.places)


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
    except MMJaxError:
        raise
    except Exception as error:  # a hostile or damaged pickle can raise nearly anything
        raise MMJaxError(
            f"{file}: not a readable torch file ({type(error).__name__}: {error}); "
            "it is damaged or incomplete, copy it again"
        ) from error
    flat = dict(_flatten(_weights_of(tree), ""))
    while flat and all(name.startswith("module.") for name in flat):
        flat = {name.removeprefix("module."): tensor for name, tensor in flat.items()}
    if not flat:
        raise MMJaxError(f"{file}: holds no tensors; give the file with the model's weights")
    return {name: tensor.locate(file, name) for name, tensor in flat.items()}


# What a model's tensors are called in a training checkpoint, whatever stands beside them.
_STATES = ("state_dict", "model_state_dict")


def _weights_of(tree: Any) -> Any:
    while isinstance(tree, dict):
        inner = next((k for k in (*_STATES, "model", "module") if k in tree), None)
        # A model may itself have a part called "model": its siblings are tensors or more parts.
        beside = (v for k, v in tree.items() if k != inner)
        if (
            inner is None
            or not isinstance(tree[inner], dict)
            or any(isinstance(v, _Tensor) for v in beside)
            or (inner not in _STATES and _parts_beside(tree, inner))
        ):
            return tree
        tree = tree[inner]
    return tree


def _parts_beside(tree: dict, inner: str) -> bool:
    training = {"optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "args", "ema"}
    rest = [v for k, v in tree.items() if k != inner and k not in training]
    return any(isinstance(v, dict) and any(_flatten(v, "")) for v in rest)


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, _Tensor):
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
            return _Unpickler(stream, file, places).load()


def _zip_place(raw: BinaryIO, member: zipfile.ZipInfo) -> tuple[int, int, str | None]:
    if member.compress_type != zipfile.ZIP_STORED:
        return 0, member.file_size, member.filename
    # The local header's extra field (torch's alignment padding) is not that of the directory.
    raw.seek(member.header_offset)
    header = raw.read(30)
    if header[:4] != b"PK\x03\x04":
        raise MMJaxError(f"{raw.name}: damaged zip, no header at {member.filename}; copy it again")
    name, extra = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + name + extra, member.file_size, None


def _read_legacy(file: Path) -> Any:
    """Read the format before torch 1.6: five pickles in a row, then the storages."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if stream.read(2) == b"PK":
            raise MMJaxError(f"{file}: a zip without its end; it is truncated, copy it again")
        stream.seek(0)
        places: dict = {}
        if _Unpickler(stream, file, places).load() != _LEGACY_MAGIC:
            raise MMJaxError(
                f"{file}: neither a zip nor a legacy torch file. Load it with PyTorch and save its "
                "tensors with safetensors.torch.save_file"
            )
        _Unpickler(stream, file, places).load()  # protocol
        _Unpickler(stream, file, places).load()  # byte order and sizes of C types
        main = _Unpickler(stream, file, places)
        tree = main.load()
        keys = _Unpickler(stream, file, places).load()
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
