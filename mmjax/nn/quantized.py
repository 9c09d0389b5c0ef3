"""Kernels of linear maps that are not trained, in fewer bits: ``int8`` or ``nf4``.

A quantised kernel is two parameters: ``kernel``, its codes, and ``kernel_scale``. The metadata of
the codes tells what they are, so that a state alone can be loaded into and multiplied out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.nn import int8, nf4, paths
from mmjax.parallel.sharding import divides

KINDS = {"int8": int8, "nf4": nf4}


def params(
    kind: str, kernel: Array, inputs: tuple[int, ...], axes: tuple[str, ...]
) -> tuple[nnx.Param, nnx.Param]:
    """Quantise a kernel [*inputs, *outputs] with the logical ``axes``; returns (codes, scales)."""
    count = len(inputs)
    codes, scale = KINDS[kind].quantize(kernel, tuple(range(count)))
    outputs = axes[count:]
    if kind == "int8":
        scale_axes = tuple("norm" if a == "embed" else a for a in outputs)  # as that of a bias
    else:
        # One axis stands for all inputs, whose first is the one that may be cut.
        pairs, blocks = (axes[0] if divides(axes[0], len(x)) else None for x in (codes, scale))
        axes, scale_axes = (pairs, *outputs), (blocks, *outputs)
    about = (kind, tuple(inputs))
    return (
        nnx.Param(codes, out_sharding=axes, quantized=about),
        nnx.Param(scale, out_sharding=scale_axes),
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A quantised kernel of a state. inputs: their sizes; at: the first of their axes."""

    kind: str
    inputs: tuple[int, ...]
    at: int

    def whole(self, codes: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
        """Return the kernel as it is before it is quantised, where its codes lie."""
        if self.kind == "int8":
            return jax.ShapeDtypeStruct(codes.shape, jnp.dtype(dtype), sharding=codes.sharding)
        shape, at = codes.shape, self.at
        cut = (*codes.sharding.spec, *[None] * (len(shape) - len(codes.sharding.spec)))
        spec = PartitionSpec(*cut[: at + 1], *[None] * (len(self.inputs) - 1), *cut[at + 1 :])
        shape = (*shape[:at], *self.inputs, *shape[at + 1 :])
        place = NamedSharding(codes.sharding.mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    def quantize(self, value: Array) -> tuple[Array, Array]:
        axes = tuple(range(self.at, self.at + len(self.inputs)))
        return KINDS[self.kind].quantize(value, axes)


def while_loading(
    abstract: nnx.State, wanted: Mapping[str, jax.ShapeDtypeStruct], dtype: str
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[str, Array], dict[str, Array]]]:
    """Return what to read for a model with quantised kernels, and what quantises each of them.

    abstract: the model's state. wanted: its parameters by name. dtype: that kernels are read in;
    one of them at a time is there in it.
    """
    kernels = _kernels(abstract)
    read = {name: leaf for name, leaf in wanted.items() if not name.endswith(".kernel_scale")}
    for name in kernels.keys() & wanted.keys():
        read[name] = kernels[name].whole(wanted[name], dtype)

    def round_it(name: str, value: Array) -> dict[str, Array]:
        if name not in kernels:
            return {name: value}
        made = zip((name, f"{name}_scale"), kernels[name].quantize(value), strict=True)
        return {part: jax.device_put(x, wanted[part].sharding) for part, x in made}

    return read, round_it


def multiplied_out(state: nnx.State, dtype: str) -> dict[str, Array]:
    """Return the parameters of a state by name, quantised kernels as the numbers they stand for.

    dtype: of those kernels. Without any the parameters are returned as they are.
    """
    values = paths.flatten(state)
    out = {name: x for name, x in values.items() if not name.endswith(".kernel_scale")}
    for name, kernel in _kernels(state).items():
        dequantize, scale = KINDS[kernel.kind].dequantize, values[f"{name}_scale"]
        out[name] = dequantize(values[name], scale, kernel.inputs, kernel.at, dtype)
    return out


def _kernels(state: nnx.State) -> dict[str, _Kernel]:
    """Return the quantised kernels of a state by name."""
    found = {}
    for path, variable in nnx.to_flat_state(state):
        about = variable.get_metadata()
        if "quantized" in about:
            kind, inputs = about["quantized"]
            found[".".join(map(str, path))] = _Kernel(
                kind, inputs, about["out_sharding"].count("layers")
            )
    return found
