"""Weight-only int8: kernels of linear maps as bytes, with a float32 scale per output channel."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

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
    scaled = {name.removesuffix("_scale") for name in wanted if name.endswith(".kernel_scale")}
    read = {name: leaf for name, leaf in wanted.items() if not name.endswith(".kernel_scale")}
    axes = {}
    for path, variable in nnx.to_flat_state(abstract):
        name = ".".join(map(str, path))
        if name in scaled:
            stacked = variable.get_metadata()["out_sharding"].count("layers")
            outputs = len(wanted[f"{name}_scale"].shape) - stacked
            axes[name] = tuple(range(stacked, len(variable.shape) - outputs))
            leaf = wanted[name]
            read[name] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)

    def round_it(name: str, value: Array) -> dict[str, Array]:
        if name not in scaled:
            return {name: value}
        kernel, scale = quantize(value, axes[name])
        place = wanted[f"{name}_scale"].sharding
        return {name: kernel, f"{name}_scale": jax.device_put(scale, place)}

    return read, round_it
