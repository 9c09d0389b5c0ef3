"""Kernels of linear maps that are not trained, in fewer bits: ``int8`` or ``nf4``.

A quantised kernel is two parameters: ``kernel``, its codes, and ``kernel_scale``. The metadata of
the codes tells what they are, so that a state alone can be loaded into and multiplied out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.nn import int8, nf4
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
class Kernel:
    """What a quantised kernel of a state stands for.

    inputs: sizes of its axes of input; at: the first of them, behind that of the layers.
    """

    kind: str
    inputs: tuple[int, ...]
    at: int

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the kernel whose codes have a shape; int8 has a byte a weight."""
        if self.kind == "int8":
            return tuple(codes)
        return (*codes[: self.at], *self.inputs, *codes[self.at + 1 :])

    def whole(self, codes: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
        """Return the kernel as it is before it is quantised, where its codes lie."""
        if self.kind == "int8":
            return jax.ShapeDtypeStruct(codes.shape, jnp.dtype(dtype), sharding=codes.sharding)
        at, spec = self.at, codes.sharding.spec
        cut = (*spec, *[None] * (len(codes.shape) - len(spec)))
        spec = PartitionSpec(*cut[: at + 1], *[None] * (len(self.inputs) - 1), *cut[at + 1 :])
        place = NamedSharding(codes.sharding.mesh, spec)
        return jax.ShapeDtypeStruct(self.shape(codes.shape), jnp.dtype(dtype), sharding=place)

    def quantize(self, value: Array) -> tuple[Array, Array]:
        axes = tuple(range(self.at, self.at + len(self.inputs)))
        return KINDS[self.kind].quantize(value, axes)

    def dequantize(self, codes: Array, scale: Array, dtype: str) -> Array:
        """Return the numbers that codes and scales stand for, of all layers or of some."""
        return _dequantize(self.kind, codes, scale, self.inputs, self.at, dtype)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _dequantize(kind, codes, scale, inputs, at, dtype):  # compiled: float32 stays inside
    return KINDS[kind].dequantize(codes, scale, inputs, at, dtype)


def while_loading(
    abstract: nnx.State, wanted: Mapping[str, jax.ShapeDtypeStruct], dtype: str
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[str, Array], dict[str, Array]]]:
    """Return what to read for a model with quantised kernels, and what quantises each of them.

    abstract: the model's state. wanted: its parameters by name. dtype: that kernels are read in;
    one of them at a time is there in it.
    """
    found = kernels(abstract)
    read = {name: leaf for name, leaf in wanted.items() if not name.endswith(".kernel_scale")}
    for name in found.keys() & wanted.keys():
        read[name] = found[name].whole(wanted[name], dtype)

    def round_it(name: str, value: Array) -> dict[str, Array]:
        if name not in found:
            return {name: value}
        made = zip((name, f"{name}_scale"), found[name].quantize(value), strict=True)
        return {part: jax.device_put(x, wanted[part].sharding) for part, x in made}

    return read, round_it


def kernels(state: nnx.State) -> dict[str, Kernel]:
    """Return the quantised kernels of a state by name."""
    found = {}
    for path, variable in nnx.to_flat_state(state):
        about = variable.get_metadata()
        if "quantized" in about:
            kind, inputs = about["quantized"]
            found[".".join(map(str, path))] = Kernel(
                kind, inputs, about["out_sharding"].count("layers")
            )
    return found
