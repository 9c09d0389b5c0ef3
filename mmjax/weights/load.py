"""Bring a model's tensors onto devices, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.weights import rules as R
from mmjax.weights.reader import Reader

Progress = Callable[[int], None]
"""Told the bytes of each piece that has gone through."""

Reading = Callable[[int, int], None]
"""Told the bytes of each piece that was read, and how many this process reads in all."""

Each = Callable[[str, jax.Array], dict[str, jax.Array]]
"""Turns (path, parameter) into the parameters to keep, by path."""


def load_params(
    reader: Reader,
    rules: Sequence[R.Rule],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    only: Collection[str] | None = None,
    ignore: Sequence[str] = (),
    progress: Reading | None = None,
    each: Each | None = None,
) -> dict[str, jax.Array]:
    """Read every parameter of ``abstract`` in its dtype and onto its sharding.

    abstract: our path -> shape, dtype and, optionally, sharding; without one the array goes to the
        default device. Only shards of this process's devices are read, and the host holds one
        piece of ``rules.PIECE_BYTES`` beside what a CPU device itself keeps.
    only: names to read, None for all; the files have to hold the others as well.
    each: makes of a parameter what takes its place, as soon as it is read.
    Raises WeightsMismatch, before anything is read, unless keys and shapes agree exactly.
    """
    R.check(rules, {path: tuple(a.shape) for path, a in abstract.items()}, reader, ignore)
    table = R.by_ours(rules, abstract)
    params, wanted = {}, {p: x for p, x in abstract.items() if only is None or p in only}
    total = 0 if progress is None else sum(map(_bytes_here, wanted.values()))

    def tell(n: int) -> None:
        if progress is not None:
            progress(n, total)

    for path, leaf in wanted.items():
        value = _load_leaf(table[path], reader, leaf, tell)
        params |= {path: value} if each is None else each(path, value)
    return params


def _sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    if (given := getattr(leaf, "sharding", None)) is not None:
        return given
    device = jax.config.jax_default_device or jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def _bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
    """Count the bytes that this process reads of a parameter: what is replicated, once."""
    shape = tuple(leaf.shape)
    cut = _sharding(leaf).addressable_devices_indices_map(shape).values()
    parts = {tuple((p.start, p.stop) for p in R.whole(index, shape)) for index in cut}
    size = sum(math.prod(stop - start for start, stop in part) for part in parts)
    return size * np.dtype(leaf.dtype).itemsize


def _load_leaf(rule: R.Rule, reader: Reader, leaf: jax.ShapeDtypeStruct, progress) -> jax.Array:
    shape, sharding = tuple(leaf.shape), _sharding(leaf)
    made: dict[tuple, jax.Array] = {}
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = R.whole(index, shape)
        key = tuple((part.start, part.stop) for part in index)
        if key in made:  # replicated: read once, then from device to device
            shards.append(jax.device_put(made[key], device))
        else:
            made[key] = _load_shard(rule, reader, shape, index, leaf.dtype, device, progress)
            shards.append(made[key])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _load_shard(rule, reader, shape, index, dtype, device, progress) -> jax.Array:
    """Build one device's part of an array: on the device, so that the host never holds it whole."""
    size = tuple(part.stop - part.start for part in index)
    itemsize = np.dtype(dtype).itemsize
    chunk = rule.chunk(shape, itemsize)
    if math.prod(size) * itemsize <= R.PIECE_BYTES:
        block = R.read_piece(rule, reader, shape, index, dtype)
        progress(block.nbytes)
        return jax.device_put(block, device)
    if _shares_host_memory(device):  # fill one buffer in place
        block = np.empty(size, dtype)
        for piece, at in _pieces(index, chunk):
            part = R.read_piece(rule, reader, shape, piece, dtype)
            block[at] = part
            progress(part.nbytes)
        return jax.device_put(block, device)
    # The caller's mesh is of all devices, and this program runs on one of them.
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("one",))):
        buffer = jnp.zeros(size, dtype, device=device)
        for piece, at in _pieces(index, chunk):
            part = R.read_piece(rule, reader, shape, piece, dtype)
            starts = np.array([s.start for s in at], np.int32)
            buffer = _write(buffer, jax.device_put(part, device), starts)
            buffer.block_until_ready()  # or pieces would queue up on the host
            progress(part.nbytes)
    return buffer


def _shares_host_memory(device: jax.Device) -> bool:
    return device.platform == "cpu"


def _pieces(index: R.Index, chunk: R.Shape):
    for piece in R.grid(index, chunk):
        yield (
            piece,
            tuple(
                slice(p.start - i.start, p.stop - i.start)
                for p, i in zip(piece, index, strict=True)
            ),
        )


@partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, part: jax.Array, starts: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, part, tuple(starts))
