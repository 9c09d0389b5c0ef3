"""Where a tensor lies in a file, from which it is mapped when it is read."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np


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
        strides = self.strides or row_major(self.shape)
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        size = reach * self.dtype.itemsize
        if self.member is None:
            raw = np.memmap(self.file, np.uint8, "r", self.offset, (size,))
        else:
            with zipfile.ZipFile(self.file) as archive:
                data = archive.read(self.member)
            raw = np.frombuffer(data, np.uint8, size, self.offset)
        # A plain ndarray: np.memmap's own bookkeeping on every slice is slow.
        # As whole numbers until it has its shape: numpy can stride no float8_e5m2.
        flat = np.asarray(raw).view(np.ndarray).view(f"u{self.dtype.itemsize}")
        steps = tuple(s * self.dtype.itemsize for s in strides)
        shaped = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        return shaped.view(self.dtype)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in numbers, of an array without gaps whose last axis is the fastest."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
