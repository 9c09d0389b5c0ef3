"""Context parallelism: what has to cross the shards of the length axis.

Every device of the mesh axis ``context`` holds one contiguous share of each row's length. Two
things reach beyond it: the keys that a query sees (``mmjax.ops.attention``), and the hidden state
of a target, which may stand on another shard than the target itself (``take_on_length``).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from mmjax.parallel.sharding import spec

AXIS = "context"


def length_shards(t: int, rows: int) -> int:
    """Return into how many shards the mesh in use cuts a length t of so many rows; 1 for none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[AXIS] == 1 or t % mesh.shape[AXIS]:
        return 1
    return 1 if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) else mesh.shape[AXIS]


def shard_start(size: int) -> Array:
    """Return, inside shard_map, where this device's share of the length begins."""
    return jax.lax.axis_index(AXIS) * size


def take_on_length(x: Array, index: Array) -> Array:
    """Take x[b, index[b, r]]: [b, t, ...] and int32[b, r] give [b, r, ...].

    With context parallelism each device takes what stands on its own share, and the shares are
    summed: only the r entries travel, never x.
    """
    if length_shards(x.shape[1], x.shape[0]) == 1:
        return _take(x, index)

    def take(x: Array, index: Array) -> Array:
        local = index - shard_start(x.shape[1])
        here = (local >= 0) & (local < x.shape[1])
        got = _take(x, jnp.clip(local, 0, x.shape[1] - 1))
        got = jnp.where(here.reshape(*here.shape, *(1,) * (x.ndim - 2)), got, 0)
        return jax.lax.psum(got, AXIS)

    rows = spec("batch")
    mapped = jax.shard_map(take, in_specs=(P(*rows, AXIS), rows), out_specs=rows, check_vma=False)
    return mapped(x, index)


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
