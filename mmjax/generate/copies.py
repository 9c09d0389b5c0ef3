"""Whether an answer reads the weights where they lie, or a copy that is faster to read."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from mmjax.nn.embed import Embed
from mmjax.nn.linear import Linear
from mmjax.parallel.sharding import several_devices

APART = "apart"
"""Layer by layer, and whole over fsdp. Without it, every token copies each layer out of its stack,
and fetches what other devices hold. The prefill, where both cost little, reads the weights where
they lie: layer by layer it takes several times as long to compile."""
APART_FIRST = "apart first"
"""The prefill reads that copy too, for CPUs: no stacked cache ever exists, whose pages would be new
with each call and cost more than what is written into them, and which a scan would copy."""


def choose(params: nnx.State, kept: int, beside: int) -> str | None:
    """Return which copy the devices of the mesh in use have room for: APART or None.

    params: as they lie. kept: bytes of keys and values on a device. beside: other bytes that stay
    there. A copy counts in the dtype of the parameters, though it is made in the compute dtype,
    and half as much again as ``kept`` is for the prefill.

    It goes by the memory that JAX may take, not by what is free at the moment: programs may round
    differently, and a run that goes on must answer as one that was never stopped.
    """
    mesh = jax.sharding.get_mesh()
    several = several_devices()
    held = whole = 0
    for x in jax.tree.leaves(params):
        size = int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        held += size
        whole += size * (mesh.shape["fsdp"] if several and _cut_by_fsdp(x) else 1)
    if _least_memory(mesh) < beside + held + whole + 1.5 * kept:
        return None
    return APART


def make(model: nnx.Module) -> tuple:
    """Return the layers one by one, for a program to decode with.

    They, and in the model what makes logits, are from now on whole over fsdp and in the compute
    dtype.
    """
    layers = model.unstack()
    for _, part in nnx.iter_graph((layers, model.to_logits)):
        if isinstance(part, Linear | Embed):
            part.gather()
    return layers


def _cut_by_fsdp(x: jax.Array) -> bool:
    names = getattr(x.sharding, "spec", ())
    return any(name == "fsdp" or (isinstance(name, tuple) and "fsdp" in name) for name in names)


def _devices(mesh: jax.sharding.Mesh) -> list[jax.Device]:
    """Return those of this process."""
    return jax.local_devices()[:1] if mesh.empty else mesh.local_devices


def _least_memory(mesh: jax.sharding.Mesh) -> int:
    """Return the fewest bytes that JAX may take of any device; 0 where one does not say."""
    devices = _devices(mesh)
    least = min((d.memory_stats() or {}).get("bytes_limit", 0) for d in devices)
    if mesh.empty or len(devices) == mesh.size:
        return least
    # Processes must run one program: each knows its own devices alone. In MiB, for int32.
    return int(multihost_utils.process_allgather(np.array([least >> 20], np.int32)).min()) << 20
