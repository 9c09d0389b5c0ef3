"""Logical axes to mesh axes: the one table, and the one place that constrains activations."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.types import MMJaxError

MESH_AXES = ("data", "fsdp", "tensor", "context")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", "context"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("targets", ("data", "fsdp", "context")),
    ("head_dim", None),
    ("layers", None),
    ("norm", None),
    ("patch", None),
    ("lora", None),
)
"""Weights are cut on ``embed`` by fsdp and on heads, mlp or vocab by tensor.

``targets`` are rows of the loss: supervised positions of all samples, one behind the other.
"""

# An activation's model axis is whole on every device: fsdp already cuts its batch axis. Only where
# a table is looked up is it the other way round: ``columns`` are cut by fsdp, rows are not.
_ACTIVATION_RULES = {**dict(RULES), "embed": None, "replica": "data", "columns": "fsdp"}

ON_LENGTH = ("tokens", "positions", "visual_index", "segment_ids")
"""The arrays of a batch whose second axis is the length; patches and targets are not cut on it."""


def spec(*axes: str | None) -> PartitionSpec:
    """Return the mesh axes of an activation whose axes have these logical names."""
    for axis in axes:
        if axis is not None and axis not in _ACTIVATION_RULES:
            raise KeyError(f"logical axis {axis!r} is unknown; one of {', '.join(dict(RULES))}")
    return PartitionSpec(*(None if a is None else _ACTIVATION_RULES[a] for a in axes))


def several_devices() -> bool:
    """Tell whether the mesh in use has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh by the logical names of its axes; a no-op without a mesh.

    An axis that its mesh axes do not divide stays whole: a decode step has one token.
    """
    return _pin(x, spec(*axes)) if several_devices() else x


def gather(variable: nnx.Variable, dtype: str | None = None) -> None:
    """Make a parameter whole over fsdp, within a program; tensor still cuts it.

    dtype: that of floats from now on; None keeps it.
    """
    x, axes = variable[...], variable.get_metadata()["out_sharding"]
    if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(dtype)
    if several_devices():  # pinned as it lies too, or it might travel before it is cast
        x = _pin(x, PartitionSpec(*(dict(RULES)[axis] if axis else None for axis in axes)))
    variable.set_value(constrain(x, *axes))


def shards(axis: str, size: int) -> int:
    """Return into how many shards the mesh in use cuts an activation's axis of this size."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else _ways(mesh, _ACTIVATION_RULES[axis])
    return ways if size % ways == 0 else 1


def divides(axis: str, size: int) -> bool:
    """Tell whether the mesh in use cuts a parameter's axis of this size evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or size % _ways(mesh, dict(RULES)[axis]) == 0


def _pin(x: jax.Array, axes: PartitionSpec) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, _dividing(mesh, x.shape, axes))


def _dividing(mesh, shape: tuple[int, ...], axes: PartitionSpec) -> PartitionSpec:
    """Return the spec without the mesh axes that do not divide the shape."""
    return PartitionSpec(
        *(
            a if size % _ways(mesh, a) == 0 else None
            for a, size in zip(axes, shape[: len(axes)], strict=True)
        )
    )


def _ways(mesh, axis: str | tuple[str, ...] | None) -> int:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def batch_sharding(mesh: jax.sharding.Mesh, name: str | None = None) -> NamedSharding:
    """Return the sharding of a batch: rows over data and fsdp.

    name: of an array of the batch; those in ``ON_LENGTH`` are cut on their length by context too.
    """
    axes = ("batch", "length") if name in ON_LENGTH else ("batch",)
    return NamedSharding(mesh, spec(*axes))


def process_rows(mesh: jax.sharding.Mesh, rows: int) -> list[int]:
    """Return which rows of a global batch the devices of this process hold, in order.

    Processes that share rows (tensor or context reaches across them) get the same ones.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (cut,) in held for row in range(*cut.indices(rows))})


def row_owners(mesh: jax.sharding.Mesh, rows: int) -> list[int]:
    """Return for each row of a global batch the first process that holds it.

    What is written about a row is written there, once.
    """
    owners = [max(device.process_index for device in mesh.devices.flat)] * rows
    for device, (cut,) in batch_sharding(mesh).devices_indices_map((rows,)).items():
        for row in range(*cut.indices(rows)):
            owners[row] = min(owners[row], device.process_index)
    return owners


def put_batch(batch: dict, mesh: jax.sharding.Mesh, rows: int) -> dict[str, jax.Array]:
    """Make the global arrays of a batch from the rows of this process.

    batch: numpy arrays [r, ...], the rows that ``process_rows`` names, in that order, each whole
        in its length. rows: of the global batch.
    """
    place = {row: i for i, row in enumerate(process_rows(mesh, rows))}

    def put(name: str, value: np.ndarray) -> jax.Array:
        def cut(index):
            # A device's rows follow one another, and so do their places: a view.
            start, stop, _ = index[0].indices(rows)
            return value[(slice(place[start], place[start] + stop - start), *index[1:])]

        shape = (rows, *value.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, name), cut)

    return {name: put(name, value) for name, value in batch.items()}


def check_divides(abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise MMJaxError for the first parameter with an axis that its mesh axes do not divide.

    abstract: by name, with their shardings. Covers heads, mlp and vocabulary over tensor, and
    widths over fsdp.
    """
    for name, leaf in abstract.items():
        mesh = leaf.sharding.mesh
        for axis, (size, names) in enumerate(zip(leaf.shape, leaf.sharding.spec, strict=False)):
            if size % _ways(mesh, names):
                names = (names,) if isinstance(names, str) else names
                over = " x ".join(f"{n} {mesh.shape[n]}" for n in names)
                raise MMJaxError(
                    f"parameter {name} has shape {leaf.shape}, and its axis {axis} of {size} does "
                    f"not divide over {over}; set mesh.{names[0]} to a divisor of {size}"
                )


def parameter_shardings(abstract: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """Return a NamedSharding for every leaf of an abstract state, from its logical axes."""
    return nnx.get_named_sharding(abstract, mesh)
