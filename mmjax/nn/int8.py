"""Weight-only int8: kernels of linear maps as bytes, with a float32 scale per output channel."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.nn import paths

LARGEST = 127


@partial(jax.jit, static_argnums=1)
def quantize(kernel: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Round a kernel to int8 steps of its channels; returns (int8 like kernel, float32 scales).

    axes: those a channel runs over, the inputs of the map; the scales lack them. The largest weight
    of a channel is 127 steps, so no weight moves by more than half a step.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    return jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def while_loading(
    abstract: nnx.State, wanted: Mapping[str, jax.ShapeDtypeStruct], dtype: str
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[str, Array], dict[str, Array]]]:
    """Return what to read for a model with int8 kernels, and what rounds each of them.

    abstract: the model's state. wanted: its parameters by name. dtype: that kernels are read in;
    one of them at a time is there in it.
    """
    scaled = _input_axes(abstract)
    read = {name: leaf for name, leaf in wanted.items() if not name.endswith(".kernel_scale")}
    for name in scaled.keys() & wanted.keys():
        leaf = wanted[name]
        read[name] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)

    def round_it(name: str, value: Array) -> dict[str, Array]:
        if name not in scaled:
            return {name: value}
        kernel, scale = quantize(value, scaled[name])
        place = wanted[f"{name}_scale"].sharding
        return {name: kernel, f"{name}_scale": jax.device_put(scale, place)}

    return read, round_it


def multiplied_out(state: nnx.State, dtype: str) -> dict[str, Array]:
    """Return the parameters of a state by name, int8 kernels as the numbers they stand for.

    dtype: of those kernels. Without int8 kernels the parameters are returned as they are.
    """
    scaled, values = _input_axes(state), paths.flatten(state)
    out = {name: x for name, x in values.items() if not name.endswith(".kernel_scale")}
    for name, axes in scaled.items():
        scale = jnp.expand_dims(values[f"{name}_scale"], axes)
        out[name] = (values[name] * scale).astype(dtype)
    return out


def _input_axes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    """Return which axes each int8 kernel's scale lacks: those of its map's inputs."""
    flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    axes = {}
    for name, variable in flat.items():
        if f"{name}_scale" in flat:
            stacked = variable.get_metadata()["out_sharding"].count("layers")
            outputs = len(flat[f"{name}_scale"].shape) - stacked
            axes[name] = tuple(range(stacked, len(variable.shape) - outputs))
    return axes
