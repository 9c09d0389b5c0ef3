"""Build a device mesh and enter it."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh

from mmjax.parallel.sharding import MESH_AXES, RULES
from mmjax.types import MMJaxError


def make_mesh(shape: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """Build a mesh with the axes data, fsdp, tensor and context.

    shape: devices per axis; an axis left out is 1, and one axis may be -1, which takes the
        devices that are left. None puts every device on fsdp.
    Raises MMJaxError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(MESH_AXES, 1) | dict({"fsdp": -1} if shape is None else shape)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise MMJaxError(
            f"mesh axis {sorted(unknown)[0]!r} is unknown; the axes are {', '.join(MESH_AXES)}"
        )
    wrong = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
    if wrong:
        axis, size = next(iter(wrong.items()))
        raise MMJaxError(
            f"mesh axis {axis} is {size}; give 1 or more devices, or -1 for those that are left"
        )
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    product = math.prod(sizes.values())
    if len(free) > 1 or product != len(devices):
        raise MMJaxError(
            f"mesh {dict(sizes)} needs {fixed}{' x n' if free else ''} devices and there are "
            f"{len(devices)}; set config.mesh so that its axes multiply to {len(devices)}, "
            "with at most one axis -1 to take what is left"
        )
    # Auto: the default, Explicit, would ask for an out_sharding at every matmul and gather.
    return jax.make_mesh(
        tuple(sizes[a] for a in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def check_batch(
    mesh: Mesh, rows: int, length: int, accumulate: int = 1, *, setting: str = "data.seq_len"
) -> None:
    """Raise MMJaxError when the rows of a microbatch, or their length, do not divide over a mesh.

    rows, length: of the global batch; accumulate: microbatches in it; setting: that says length.
    """
    data, fsdp, context = (mesh.shape[axis] for axis in ("data", "fsdp", "context"))
    ways = accumulate * data * fsdp
    if rows % ways:
        raise MMJaxError(
            f"data.batch_size {rows} does not divide into accumulate {accumulate} x data {data} x "
            f"fsdp {fsdp}; choose a multiple of {ways}"
        )
    if length % context:
        raise MMJaxError(
            f"{setting} {length} does not divide over context {context}; choose a multiple of "
            f"{context}, such as {-(-length // context) * context}, or change mesh.context"
        )


@contextlib.contextmanager
def use(mesh: Mesh | None = None) -> Iterator[Mesh]:
    """Enter a mesh and the logical axis rules; None makes a mesh of one device.

    Parameters carry logical axes, and flax resolves them when they are made, so a model can only
    be built inside this context.
    """
    mesh = make_mesh({}, jax.local_devices()[:1]) if mesh is None else mesh
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        yield mesh
