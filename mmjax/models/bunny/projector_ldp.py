"""MobileVLM's convolutions over a grid of tokens, MobileNetV3 blocks with LayerNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.norm import LayerNorm
from mmjax.parallel.sharding import constrain
from mmjax.weights import tables
from mmjax.weights.operations import conv_patch, conv_pixel
from mmjax.weights.rules import Rule


def squeezed(d: int) -> int:
    """Return the width inside squeeze-and-excitation: a quarter in steps of 8, as torchvision has.

    Never more than a tenth below the quarter.
    """
    quarter = d // 4
    width = max(8, (quarter + 4) // 8 * 8)
    return width + 8 if width < 0.9 * quarter else width


class MobileBlock(nnx.Module):
    """A 3x3 convolution of each channel by itself, a gate of channels, and a map between them.

    An inverted residual without expansion (Howard et al. 2019), its norms over channels as in
    MobileVLM (Chu et al. 2023); residual where the stride is 1.
    """

    def __init__(
        self, d: int, *, stride: int, init_std: float | None, dtypes: DTypes, lora: LoRA | None,
        rngs: nnx.Rngs, prefix: str,
    ):  # fmt: skip
        self.stride, self.dtype = stride, dtypes.compute

        def linear(name: str, d_in: int, d_out: int, axes: tuple[str, ...], bias: bool) -> Linear:
            std = (3 * d_in) ** -0.5 if init_std is None else init_std
            return Linear(
                (d_in,), (d_out,), axes, name=prefix + name, bias=bias, init_std=std, dtypes=dtypes,
                lora=lora, rngs=rngs,
            )  # fmt: skip

        std = 27**-0.5 if init_std is None else init_std
        kernel = jax.nn.initializers.normal(std)(rngs.params(), (3, 3, 1, d))
        self.depthwise_kernel = nnx.Param(
            kernel.astype(dtypes.param), out_sharding=("patch", "patch", "patch", "norm")
        )
        self.depthwise_norm = LayerNorm(d, eps=1e-5, dtypes=dtypes)
        self.squeeze = linear("squeeze", d, squeezed(d), ("embed", "mlp"), True)
        self.excite = linear("excite", squeezed(d), d, ("mlp", "embed"), True)
        self.project = linear("project", d, d, ("embed", "mlp"), False)
        self.project_norm = LayerNorm(d, eps=1e-5, dtypes=dtypes)

    def __call__(self, x: Array) -> Array:
        """Map a grid [b, row, column, d] to one of 1/stride of its rows and columns, rounded up."""
        kernel = self.depthwise_kernel[...].astype(self.dtype)
        y = jax.nn.hard_swish(self.depthwise_norm(_depthwise(x, kernel, self.stride)))
        # Pinned: left alone, XLA's partitioner (jax 0.10.2) swaps samples between devices in the
        # gradient of the map below, on a mesh with data, fsdp and tensor.
        y = constrain(y, "batch", None, None, "embed")
        gate = jax.nn.relu(self.squeeze(y.mean((1, 2))))
        y = y * jax.nn.hard_sigmoid(self.excite(gate))[:, None, None]
        y = self.project_norm(self.project(y))
        return x + y if self.stride == 1 else y


def _depthwise(x: Array, kernel: Array, stride: int) -> Array:
    """Convolve each channel of [b, row, column, d] with its own [3, 3, 1, d], zeros around."""
    rows, columns = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Nine products of the whole grid: on CPUs XLA's grouped convolutions, and their gradients
    # above all, are slower by far.
    return sum(
        x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j]
        for i in range(3)
        for j in range(3)
    )


def block_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Return the table of a block: ``ours`` and ``theirs`` begin the names of its tensors."""
    return (
        Rule(f"{ours}depthwise_kernel", f"{theirs}0.0.weight", conv_patch),
        *tables.norm(f"{ours}depthwise_norm", f"{theirs}0.1"),
        *tables.linear(f"{ours}squeeze", f"{theirs}1.fc1", conv_pixel),
        *tables.linear(f"{ours}excite", f"{theirs}1.fc2", conv_pixel),
        Rule(f"{ours}project.kernel", f"{theirs}2.0.weight", conv_pixel),
        *tables.norm(f"{ours}project_norm", f"{theirs}2.1"),
    )
