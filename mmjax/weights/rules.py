"""Tables that say which of our parameters is which tensor of a published model.

A rule pairs names and says by an operation how the numbers lie. Here a table is checked against a
model, read piece by piece, and written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, for the casts below)
import numpy as np

from mmjax.types import MMJaxError
from mmjax.weights.operations import Identity, Op, Shape, identity
from mmjax.weights.reader import Reader

Index = tuple[slice, ...]

PIECE_BYTES = 64 * 2**20
"""What is held of a parameter at a time, and the size of a stored chunk."""

_TILE = 128


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: our path, their key (``{l}`` where the layer's number stands), the op.

    With ``{l}`` our array has the layers as its first axis, which the op does not see. first, step:
    the number of our first layer at theirs, and from each to the next.
    """

    ours: str
    theirs: str
    op: Op = identity
    first: int = 0
    step: int = 1

    @property
    def stacked(self) -> bool:
        return "{l}" in self.theirs

    def keys(self, shape: Shape) -> list[str]:
        """Return their keys of our whole array."""
        return [self.key(i) for i in range(shape[0])] if self.stacked else [self.theirs]

    def key(self, layer: int) -> str:
        return self.theirs.replace("{l}", str(self.first + layer * self.step))

    def inner(self, shape: Shape) -> Shape:
        """Return the shape the op sees."""
        return shape[1:] if self.stacked else shape

    def chunk(self, shape: Shape, itemsize: int, limit: int | None = None) -> Shape:
        """Return a block of our array of at most ``limit`` bytes that reads whole rows of theirs.

        The whole array, a few layers, or one layer cut along their first axis; pieces of nearly one
        size, because a file has the last one as large as the others.
        """
        limit = limit or PIECE_BYTES
        block = list(shape)
        axes = [self.op.axis(self.inner(shape)) + self.stacked] if len(self.inner(shape)) else []
        for axis in [0, *axes] if self.stacked else axes:
            rest = math.prod(block) // max(block[axis], 1) * itemsize
            if rest * block[axis] > limit:
                pieces = math.ceil(block[axis] / max(1, limit // max(rest, 1)))
                block[axis] = math.ceil(block[axis] / pieces)
        return tuple(block)


class WeightsMismatch(MMJaxError):
    """A model's files do not hold exactly the parameters of the model; lists every difference."""


def by_ours(rules: Sequence[Rule], paths: Iterable[str]) -> dict[str, Rule]:
    """Return the rule of each of our paths; raises MMJaxError for a path without one."""
    paths = list(paths)
    table = {rule.ours: rule for rule in rules}
    without = [path for path in paths if path not in table]
    if without:
        raise MMJaxError(f"no rule for {_some(without)}; add it to the family's table")
    return {path: table[path] for path in paths}


def expected(rules: Sequence[Rule], ours: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return every key and shape that a file of parameters ``ours`` has."""
    table = by_ours(rules, ours)
    return {
        key: rule.op.theirs_shape(rule.inner(ours[path]))
        for path, rule in table.items()
        for key in rule.keys(ours[path])
    }


def check(
    rules: Sequence[Rule], ours: Mapping[str, Shape], reader: Reader, ignore: Sequence[str] = ()
) -> None:
    """Raise WeightsMismatch unless the reader holds exactly what ``ours`` needs.

    ignore: regular expressions of keys that carry nothing to learn, searched in the whole key.
    """
    wanted = expected(rules, ours)
    there = set(reader.keys())
    skip = [re.compile(pattern) for pattern in ignore]
    missing = [key for key in wanted if key not in there]
    unexpected = sorted(
        key for key in there - wanted.keys() if not any(p.search(key) for p in skip)
    )
    misshapen = [
        f"{key} {list(reader.shape(key))} (the model has {list(shape)})"
        for key, shape in wanted.items()
        if key in there and tuple(reader.shape(key)) != shape
    ]
    if not (missing or unexpected or misshapen):
        return
    folders = list(dict.fromkeys(str(file.parent) for file in reader.files))
    where = ", ".join(folders[:3]) or "model"
    lines = [f"{where}: its tensors are not those of the model:"]
    for name, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshapen", misshapen),
    ):
        if keys:
            lines.append(f"  {len(keys)} {name}: {_some(keys)}")
    lines.append("  " + _advice(missing, unexpected, misshapen))
    raise WeightsMismatch("\n".join(lines))


def _advice(missing: list, unexpected: list, misshapen: list) -> str:
    if misshapen and not missing and not unexpected:
        return "Make config.json state the sizes the model was trained with."
    if missing and not unexpected:
        return (
            "Download the missing shards, or lower num_hidden_layers in config.json if the model "
            "is smaller than it says."
        )
    if unexpected and not missing:
        return (
            "Remove those tensors if they are not part of the model, or raise num_hidden_layers "
            "in config.json if the model is bigger than it says."
        )
    return (
        "config.json and the weights are probably of different models: "
        "`python -m convert_weights.inspect FOLDER` shows both."
    )


def _some(names: Sequence[str], limit: int = 12) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f", ... and {more} more" if more > 0 else "")


def grid(index: Index, chunk: Shape) -> Iterator[Index]:
    """Cut an index into blocks that end on multiples of ``chunk``."""
    axes = []
    for part, step in zip(index, chunk, strict=True):
        cuts, at = [], part.start
        while at < part.stop:
            end = min(part.stop, (at // step + 1) * step)
            cuts.append(slice(at, end))
            at = end
        axes.append(cuts)
    return itertools.product(*axes)


def whole(index: Sequence[slice], shape: Shape) -> Index:
    """Replace the open ends of an index by numbers."""
    return tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, shape, strict=True))


def read_piece(rule: Rule, reader: Reader, shape: Shape, index: Index, dtype) -> np.ndarray:
    """Read ``index`` of our array of ``shape`` from their tensors, in ``dtype``."""
    out = np.empty([part.stop - part.start for part in index], dtype)
    inner = rule.inner(shape)
    if rule.stacked:
        for at, layer in enumerate(range(index[0].start, index[0].stop)):
            theirs = reader.read(rule.key(layer))
            _copy(out[at], rule.op.view(theirs, inner)[index[1:]])
    elif isinstance(rule.op, Identity):  # the reader may hold it in chunks of its own
        _copy(out, reader.read(rule.theirs, index))
    else:
        _copy(out, rule.op.view(reader.read(rule.theirs), inner)[index])
    return out


def _copy(out: np.ndarray, source: np.ndarray) -> None:
    if out.dtype == source.dtype and out.dtype.itemsize == 2:
        # numpy copies its own dtypes far faster than the ones ml_dtypes adds.
        out, source = out.view(np.uint16), source.view(np.uint16)
    if out.ndim < 2 or source.strides == out.strides or out.nbytes < 2**20:
        np.copyto(out, source, casting="unsafe")
        return
    # Transposed: in tiles that fit the cache, or every number costs a cache line.
    fast = min(range(out.ndim), key=lambda axis: abs(source.strides[axis]))
    tile = [_TILE if axis in (fast, out.ndim - 1) else 1 for axis in range(out.ndim)]
    if fast == out.ndim - 1:
        tile[-2], tile[-1] = out.shape[-2:]
    for index in grid(tuple(slice(0, n) for n in out.shape), tuple(tile)):
        np.copyto(out[index], source[index], casting="unsafe")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to be written: its numbers are made when ``make()`` is called."""

    key: str
    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export(rules: Sequence[Rule], source: Reader, dtype=None) -> list[Tensor]:
    """Return their tensors of our parameters, layer by layer, none of them read yet.

    source: our arrays by path. dtype: of the tensors; None keeps each parameter's own. Making one
    raises MMJaxError where float16 would turn a number into an infinity.
    """
    table = by_ours(rules, source.keys())
    parts: dict[str, list[tuple[str, Rule, int]]] = {}
    for path, rule in table.items():
        for layer, key in enumerate(rule.keys(source.shape(path))):
            parts.setdefault(key, []).append((path, rule, layer))
    tensors = []
    for key in sorted(parts, key=_natural):
        path, rule, _ = parts[key][0]
        shape = rule.op.theirs_shape(rule.inner(source.shape(path)))
        kind = np.dtype(dtype or source.dtype(path))
        make = partial(_made, key, parts[key], source, shape, kind)
        tensors.append(Tensor(key, shape, kind, make))
    return tensors


def _made(key: str, parts: list, source: Reader, theirs: Shape, dtype: np.dtype) -> np.ndarray:
    """Assemble a tensor; raises MMJaxError for a number that float16 has not."""
    with np.errstate(over="ignore"):  # it is told below
        out = _assemble(parts, source, theirs, dtype)
    if dtype == np.float16 and not np.isfinite(out).all():
        raise MMJaxError(
            f"{key}: holds a number beyond 65504, the largest of float16; write bfloat16 or float32"
        )
    return out


def _assemble(parts: list, source: Reader, theirs: Shape, dtype: np.dtype) -> np.ndarray:
    out = np.zeros(theirs, dtype)  # zeros: an adapter may hold only q of a fused q, k, v
    for path, rule, layer in parts:
        shape = source.shape(path)
        inner = rule.inner(shape)
        target = rule.op.view(out, inner)
        lead = (slice(layer, layer + 1),) if rule.stacked else ()
        block = rule.chunk(shape, dtype.itemsize)[len(lead) :]
        for index in grid(tuple(slice(0, n) for n in inner), block):
            piece = source.read(path, lead + index)
            _copy(target[index], piece[0] if rule.stacked else piece)
    return out


def _natural(key: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
