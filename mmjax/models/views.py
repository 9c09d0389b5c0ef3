"""Readers that show parameters otherwise: by our names, merged, averaged, resized, unquantised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.nn import paths, quantized
from mmjax.nn.linear import LoRA
from mmjax.weights import rules as R
from mmjax.weights.reader import Reader
from mmjax.weights.writer import Arrays


def is_lora(name: str) -> bool:
    """Tell whether a parameter of this dotted name is half of an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def stored_dtype(rule: R.Rule, reader: Reader, shape: R.Shape) -> np.dtype:
    """Return the dtype that one of our parameters, of ``shape``, needs to lose nothing.

    Layers may be stored in several: float32 then holds them all, or float64 where one has it.
    """
    kinds = {np.dtype(reader.dtype(key)) for key in rule.keys(shape)}
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)


class Canonical:
    """A model's parameters by our names, read through its rules."""

    def __init__(self, reader: Reader, rules: Sequence[R.Rule], shapes: Mapping[str, R.Shape]):
        self.reader, self.shapes, self.files = reader, dict(shapes), reader.files
        self.table = R.by_ours(rules, shapes)

    def keys(self) -> Iterable[str]:
        return self.shapes.keys()

    def shape(self, key: str) -> R.Shape:
        return self.shapes[key]

    def dtype(self, key: str) -> np.dtype:
        return stored_dtype(self.table[key], self.reader, self.shapes[key])

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        shape = self.shapes[key]
        index = () if index is ... else index
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        index = R.whole(index, shape)
        return R.read_piece(self.table[key], self.reader, shape, index, self.dtype(key))


class Subset:
    """Some of a reader's arrays."""

    def __init__(self, reader: Reader, names: Sequence[str]):
        self.reader, self.names, self.files = reader, list(names), reader.files

    def keys(self) -> Iterable[str]:
        return self.names

    def shape(self, key: str) -> R.Shape:
        return self.reader.shape(key)

    def dtype(self, key: str) -> np.dtype:
        return self.reader.dtype(key)

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        return self.reader.read(key, index)


class Merged(Subset):
    """A reader whose kernels have their low-rank update added, in float32, layer by layer."""

    def __init__(self, reader: Reader, lora: LoRA):
        super().__init__(reader, [k for k in reader.keys() if not is_lora(k)])  # noqa: SIM118
        self.scale = lora.scale
        self.adapted = {
            k.removesuffix("lora_a") + "kernel"
            for k in reader.keys()  # noqa: SIM118
            if k.endswith(".lora_a")
        }

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        kernel = self.reader.read(key, index)
        if key not in self.adapted:
            return kernel
        stem, shape = key.removesuffix("kernel"), self.shape(key)
        a, b = self.reader.shape(f"{stem}lora_a"), self.reader.shape(f"{stem}lora_b")
        index = () if index is ... else index
        index = R.whole((*index, *[slice(None)] * (len(shape) - len(index))), shape)
        # With one leading layers axis: a [l, *in, r], b [l, r, *out]; without it the same, bare.
        lead = int(len(a) - 1 + len(b) - 1 > len(shape))
        n_in = len(a) - 1 - lead
        low = self.reader.read(f"{stem}lora_a", index[: lead + n_in])
        high = self.reader.read(
            f"{stem}lora_b", (*index[:lead], slice(None), *index[lead + n_in :])
        )
        r = low.shape[-1]
        layers = low.shape[0] if lead else 1
        low = low.astype(np.float32).reshape(layers, -1, r)
        high = high.astype(np.float32).reshape(layers, r, -1)
        update = np.matmul(low, high).reshape(kernel.shape) * np.float32(self.scale)
        return (kernel.astype(np.float32) + update).astype(kernel.dtype)


class Averaged(Subset):
    """The weighted sum of readers of the same arrays, in float32, in the widest of their dtypes."""

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float]):
        super().__init__(readers[0], list(readers[0].keys()))
        self.readers, self.weights = list(readers), [np.float32(w) for w in weights]
        self.files = [file for reader in readers for file in reader.files]

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(jnp.result_type(*(reader.dtype(key) for reader in self.readers)))

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        total = np.float32(0)
        for reader, weight in zip(self.readers, self.weights, strict=True):
            total = total + reader.read(key, index).astype(np.float32) * weight
        return total.astype(self.dtype(key))


class Resized(Subset):
    """A reader whose tables have other numbers of rows: cut at the end, or extended by zeros."""

    def __init__(self, reader: Reader, rows: Mapping[str, int]):
        """rows: of each table that is resized, by key."""
        super().__init__(reader, list(reader.keys()))
        self.rows = dict(rows)

    def shape(self, key: str) -> R.Shape:
        shape = tuple(self.reader.shape(key))
        return (self.rows[key], *shape[1:]) if key in self.rows else shape

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        if key not in self.rows:
            return self.reader.read(key, index)
        shape = self.shape(key)
        index = () if index is ... else index if isinstance(index, tuple) else (index,)
        index = R.whole((*index, *[slice(None)] * (len(shape) - len(index))), shape)
        rows, rest = index[0], index[1:]
        there = self.reader.shape(key)[0]
        kept = slice(min(rows.start, there), min(rows.stop, there))  # none of a piece behind it
        own = self.reader.read(key, (kept, *rest))
        more = rows.stop - max(rows.start, there)
        if more <= 0:
            return own
        return np.concatenate([own, np.zeros((more, *own.shape[1:]), own.dtype)])


class MultipliedOut(Arrays):
    """Parameters of a state, quantised kernels as the numbers they stand for, in a dtype.

    They are multiplied out as they are read, a few layers at a time, for all of them may be more
    than a device holds; of kernels without layers the last one is kept.
    """

    def __init__(self, state: nnx.State, dtype: str):
        values = paths.flatten(state)
        self.kernels, self.kind = quantized.kernels(state), np.dtype(dtype)
        self.scales = {name: values.pop(f"{name}_scale") for name in self.kernels}
        super().__init__(values)
        self._last: tuple[str, Any] = ("", None)

    def shape(self, key: str) -> R.Shape:
        kernel = self.kernels.get(key)
        return super().shape(key) if kernel is None else kernel.shape(super().shape(key))

    def dtype(self, key: str) -> np.dtype:
        return self.kind if key in self.kernels else super().dtype(key)

    def piece(self, key: str, index: Any) -> Any:
        if key not in self.kernels:
            return super().piece(key, index)
        kernel = self.kernels[key]
        index = (slice(None),) * len(self.shape(key)) if index is ... else index
        layers, inside = index[: kernel.at], index[kernel.at :]
        if layers or self._last[0] != key:
            codes, scale = self.arrays[key][layers], self.scales[key][layers]
            made = kernel.dequantize(codes, scale, self.kind.name)
            self._last = ("", None) if layers else (key, made)
        else:
            made = self._last[1]
        return made[(slice(None),) * len(layers) + tuple(inside)]
