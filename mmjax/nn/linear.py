"""Linear maps between groups of axes, with an optional low-rank adapter beside the kernel."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclasses.dataclass(frozen=True)
class DTypes:
    """The two dtypes a model is given; softmax, norms, angles and loss are float32 anyway."""

    param: str = "float32"
    compute: str = "float32"


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation of the linear maps whose path matches (Hu et al. 2021).

    rank: of the update. alpha: the update is scaled by alpha / rank.
    targets: names of linear maps, such as ``attn.q`` or ``mlp.up``; see ``mmjax.lora``.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Linear(nnx.Module):
    """y = x kernel + bias, contracting the last ``len(d_in)`` axes of x.

    kernel: [*d_in, *d_out]; bias: [*d_out]; lora_a: [*d_in, r]; lora_b: [r, *d_out].
    """

    def __init__(
        self,
        d_in: tuple[int, ...],
        d_out: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        name: str,
        bias: bool,
        dtypes: DTypes,
        init_std: float,
        rngs: nnx.Rngs,
        lora: LoRA | None = None,
    ):
        param = jnp.dtype(dtypes.param)
        self.n_in, self.dtype = len(d_in), dtypes.compute
        normal = jax.nn.initializers.normal(init_std)
        self.kernel = nnx.Param(normal(rngs.params(), (*d_in, *d_out), param), out_sharding=axes)
        out_axes = axes[self.n_in :]
        # A bias is too small to be worth cutting by fsdp; by tensor it follows its kernel.
        bias_axes = tuple("norm" if a == "embed" else a for a in out_axes)
        self.bias = nnx.Param(jnp.zeros(d_out, param), out_sharding=bias_axes) if bias else None
        if lora is None or name not in lora.targets:
            self.lora_a = self.lora_b = None
            self.lora_scale = 0.0
        else:
            # The adapter is trained: float32 masters whatever the frozen kernel's dtype.
            bound = 1.0 / math.sqrt(math.prod(d_in))
            a = jax.random.uniform(rngs.params(), (*d_in, lora.rank), minval=-bound, maxval=bound)
            self.lora_a = nnx.LoRAParam(a, out_sharding=(*axes[: self.n_in], "lora"))
            b = jnp.zeros((lora.rank, *d_out))
            self.lora_b = nnx.LoRAParam(b, out_sharding=("lora", *out_axes))
            self.lora_scale = lora.scale

    def __call__(self, x: Array) -> Array:
        """Map [..., *d_in] to [..., *d_out] in the compute dtype."""
        x = x.astype(self.dtype)
        y = _contract(x, self.kernel[...].astype(self.dtype), self.n_in)
        if self.lora_a is not None:
            low = _contract(x, self.lora_a[...].astype(self.dtype), self.n_in)
            up = _contract(low, self.lora_b[...].astype(self.dtype), 1)
            y = y + up * self.lora_scale
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return y


def _contract(x: Array, kernel: Array, n: int) -> Array:
    axes = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())))
