"""How one of our arrays lies in one of their tensors: the operations of the tables of rules.

An op is one function, ``view(theirs, shape)``: it shows their tensor, or the part of it that is
ours, in the shape of ours without copying. Reading takes numbers out of the view, writing puts
numbers into it, so a table is its own inverse and import and export cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Op(Protocol):
    """How one of our arrays lies in one of their tensors.

    axis(ours) is the axis of ours that runs along their first axis: cutting there reads whole rows.
    """

    def theirs_shape(self, ours: Shape) -> Shape: ...
    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray: ...
    def axis(self, ours: Shape) -> int: ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """The same array."""

    def theirs_shape(self, ours: Shape) -> Shape:
        return ours

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        return theirs

    def axis(self, ours: Shape) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Dense:
    """A torch Linear: theirs [out, in], ours [*in, *out] with ``n_in`` axes of input."""

    n_in: int = 1

    def theirs_shape(self, ours: Shape) -> Shape:
        return math.prod(ours[self.n_in :]), math.prod(ours[: self.n_in])

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        n, n_out = self.n_in, len(ours) - self.n_in
        theirs = theirs.reshape(ours[n:] + ours[:n])
        return theirs.transpose(*range(n_out, n_out + n), *range(n_out))

    def axis(self, ours: Shape) -> int:
        return self.n_in


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The same numbers in the same order: theirs flat, ours [n, h]."""

    def theirs_shape(self, ours: Shape) -> Shape:
        return (math.prod(ours),)

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        return theirs.reshape(ours)

    def axis(self, ours: Shape) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Leading:
    """The same array with ``n`` axes of length 1 before it."""

    n: int = 1

    def theirs_shape(self, ours: Shape) -> Shape:
        return (1,) * self.n + ours

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        return theirs.reshape(ours)

    def axis(self, ours: Shape) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Fused:
    """Part i of a fused projection such as q, k, v: theirs [n * parts * h, ...].

    ours [..., n, h]: a kernel [d, n, h] of theirs [n * parts * h, d], or a bias [n, h].
    by_head: the parts of a head stand together (GPT-NeoX); else all q, all k, all v (MPT, CLIP).
    """

    i: int
    parts: int = 3
    by_head: bool = True

    def theirs_shape(self, ours: Shape) -> Shape:
        *lead, n, h = ours
        return (n * self.parts * h, *lead)

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        *lead, n, h = ours
        if self.by_head:
            part = theirs.reshape(n, self.parts, h, *lead)[:, self.i]
        else:
            part = theirs.reshape(self.parts, n, h, *lead)[self.i]
        return part.transpose(*range(2, part.ndim), 0, 1)

    def axis(self, ours: Shape) -> int:
        return len(ours) - 2


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part i of a torch Linear that is several, one after the other: theirs [parts * f, d].

    ours [d, f]: the gate or the rest of a gated MLP's first map (Phi-3).
    """

    i: int
    parts: int = 2

    def theirs_shape(self, ours: Shape) -> Shape:
        d, f = ours
        return self.parts * f, d

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        f = ours[1]
        return theirs[self.i * f : (self.i + 1) * f].T

    def axis(self, ours: Shape) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class ConvPatch:
    """A torch Conv2d over whole patches: theirs [out, channel, row, column].

    ours [row, column, channel, out]: the kernel of a Linear over patches as images hold them.
    """

    def theirs_shape(self, ours: Shape) -> Shape:
        row, column, channel, out = ours
        return out, channel, row, column

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        return theirs.transpose(2, 3, 1, 0)

    def axis(self, ours: Shape) -> int:
        return 3


@dataclasses.dataclass(frozen=True)
class ConvPixel:
    """A torch Conv2d of one pixel, which is a Linear: theirs [out, in, 1, 1], ours [in, out]."""

    def theirs_shape(self, ours: Shape) -> Shape:
        return ours[1], ours[0], 1, 1

    def view(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        return theirs[:, :, 0, 0].T

    def axis(self, ours: Shape) -> int:
        return 1


identity, transpose, flat = Identity(), Dense(1), Reshape()
conv_patch, conv_pixel = ConvPatch(), ConvPixel()


def reshape_in(n_in: int) -> Dense:
    """Return the op of a Linear that takes several of our axes, such as [n, h] of ``attn.o``."""
    return Dense(n_in)
