"""Read the pickles of ``torch.save`` without torch and without running anything they name.

Only the functions that rebuild a tensor are allowed, and they are our own; any other global is
refused by name before it is looked up.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import types
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mmjax.types import MMJaxError
from mmjax.weights.tensor_info import TensorInfo, row_major

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


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    dtype: np.dtype
    numel: int
    key: str
    places: dict  # key -> (offset, bytes, member); filled later in the legacy format


@dataclasses.dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as a pickle tells it: a part of a storage that lies elsewhere in the file."""

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
        strides = None if self.strides == row_major(self.shape) else self.strides
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


class _Function:
    """A function that a pickle may call, and not change: an opcode sets attributes of any other."""

    __slots__ = ("call",)

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        return self.call(*args)

    def __setstate__(self, state):
        raise TypeError("a pickle may not change a function")


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return PickledTensor(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _rebuild_tensor_v3(storage, offset, shape, strides, grad, hooks, dtype, *_):
    return PickledTensor(storage, offset, tuple(shape), tuple(strides), np.dtype(_DTYPES[dtype]))


def _rebuild_parameter(data, *_):
    return data


def _same(value, *_):
    return value


def _empty(*_):
    return {}


_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.jit._pickle", f"build_{kind}list"): _same for kind in ("int", "double", "bool")},
    ("torch.jit._pickle", "build_tensorlist"): _same,
    ("torch.jit._pickle", "restore_type_tag"): _same,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _empty,
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


class Unpickler(pickle.Unpickler):
    """Loads one pickle of a file. places: filled with where the storages lie, key by key.

    Raises MMJaxError for a global that is no part of a tensor.
    """

    def __init__(self, stream: BinaryIO, file: Path, places: dict):
        super().__init__(stream, encoding="utf-8")
        self.file, self.places, self.storages = file, places, {}

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] == "__torch__":
            return _Scripted
        try:
            found = _ALLOWED[module, name]
            return _Function(found) if isinstance(found, types.FunctionType) else found
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
