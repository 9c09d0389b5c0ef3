"""Logical axes to mesh axes: the one table, and the one place that constrains activations."""

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", "context"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("norm", None),
    ("patch", None),
    ("lora", None),
)
"""Weights are cut on ``embed`` by fsdp and on heads, mlp or vocab by tensor."""

# An activation's model axis is whole on every device: fsdp already cuts its batch axis.
_ACTIVATION_RULES = {**dict(RULES), "embed": None}


def spec(*axes: str | None) -> PartitionSpec:
    """Return the mesh axes of an activation whose axes have these logical names."""
    for axis in axes:
        if axis is not None and axis not in _ACTIVATION_RULES:
            raise KeyError(f"logical axis {axis!r} is unknown; one of {', '.join(dict(RULES))}")
    return PartitionSpec(*(None if a is None else _ACTIVATION_RULES[a] for a in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh by the logical names of its axes; a no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def parameter_shardings(abstract: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """Return a NamedSharding for every leaf of an abstract state, from its logical axes."""
    return nnx.get_named_sharding(abstract, mesh)
