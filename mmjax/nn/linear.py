"""Linear maps between groups of axes, with an optional low-rank adapter beside the kernel."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.nn import nf4, quantized
from mmjax.nn.dropout import drop
from mmjax.parallel.sharding import gather, several_devices


@dataclasses.dataclass(frozen=True)
class DTypes:
    """The dtypes a model is given; softmax, norms, angles and loss are float32 anyway.

    kernel: of the kernels of linear maps, None for ``param``, or a kind of ``mmjax.nn.quantized``:
    int8 or nf4. maps: the maps it is for, by their names in ``LoRA.targets``; None for all whose
    names begin as none of ``whole``.
    """

    param: str = "float32"
    compute: str = "float32"
    kernel: str | None = None
    maps: tuple[str, ...] | None = None
    whole: tuple[str, ...] = ()

    def quantized(self, name: str) -> str | None:
        """Return the kind that the kernel of a linear map is quantised to, or None."""
        chosen = not name.startswith(self.whole) if self.maps is None else name in self.maps
        return self.kernel if chosen and self.kernel in quantized.KINDS else None


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation of the linear maps that ``targets`` names (Hu et al. 2021).

    rank: of the update. alpha: the update is scaled by alpha / rank, or with ``rslora`` by
    alpha / sqrt(rank), which keeps its size when the rank grows (Kalajdzievski 2023).
    targets: names of linear maps, such as ``attn.q`` or ``mlp.up``. dropout: the share of an
    adapter's inputs that is dropped in training; see ``mmjax.nn.dropout``.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


_AS_MATRICES: contextvars.ContextVar[bool] = contextvars.ContextVar("as_matrices", default=True)


@contextlib.contextmanager
def axes_apart() -> Iterator[None]:
    """Keep the axes of linear maps apart on one CPU too: as programs of other devices have them."""
    token = _AS_MATRICES.set(False)
    try:
        yield
    finally:
        _AS_MATRICES.reset(token)


class Linear(nnx.Module):
    """y = x kernel + bias, contracting the last ``len(d_in)`` axes of x.

    kernel: [*d_in, *d_out]; bias: [*d_out]; lora_a: [*d_in, r]; lora_b: [r, *d_out]. An int8
    kernel counts steps of kernel_scale: [*d_out]; of an nf4 kernel see ``mmjax.nn.nf4``.
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
        self.d_in, self.n_in, self.dtype = d_in, len(d_in), dtypes.compute
        normal = jax.nn.initializers.normal(init_std)
        kernel = normal(rngs.params(), (*d_in, *d_out), param)
        out_axes = axes[self.n_in :]
        # A bias is too small to be worth cutting by fsdp; by tensor it follows its kernel.
        bias_axes = tuple("norm" if a == "embed" else a for a in out_axes)
        self.kind = dtypes.quantized(name)
        if self.kind is None:
            self.kernel, self.kernel_scale = nnx.Param(kernel, out_sharding=axes), None
        else:
            self.kernel, self.kernel_scale = quantized.params(self.kind, kernel, d_in, axes)
        self.bias = nnx.Param(jnp.zeros(d_out, param), out_sharding=bias_axes) if bias else None
        if lora is None or name not in lora.targets:
            self.lora_a = self.lora_b = None
            self.lora_scale = self.dropout = 0.0
        else:
            # The adapter is trained: float32 masters whatever the frozen kernel's dtype.
            bound = 1.0 / math.sqrt(math.prod(d_in))
            a = jax.random.uniform(rngs.params(), (*d_in, lora.rank), minval=-bound, maxval=bound)
            self.lora_a = nnx.LoRAParam(a, out_sharding=(*axes[: self.n_in], "lora"))
            b = jnp.zeros((lora.rank, *d_out))
            self.lora_b = nnx.LoRAParam(b, out_sharding=("lora", *out_axes))
            self.lora_scale, self.dropout = lora.scale, lora.dropout
            # Maps of one block with the same input draw one mask: q, k and v, which are one fused
            # map in the peer.
            self.mask = f"{name.rpartition('.')[0] or name}{d_in}"

    def __call__(self, x: Array) -> Array:
        """Map [..., *d_in] to [..., *d_out] in the compute dtype."""
        x = x.astype(self.dtype)
        if self.kind is None:
            y = _contract(x, self.kernel[...].astype(self.dtype), self.n_in)
        else:  # the kernel is multiplied out again for the gradient of x, not kept for it
            y = jax.checkpoint(self._quantized)(x, self.kernel[...], self.kernel_scale[...])
        if self.lora_a is not None:
            dropped = drop(x, self.dropout, self.mask)
            low = _contract(dropped, self.lora_a[...].astype(self.dtype), self.n_in)
            up = _contract(low, self.lora_b[...].astype(self.dtype), 1)
            # In float32: bfloat16 would round the scale itself, which merging does not.
            y = y + (up.astype(jnp.float32) * self.lora_scale).astype(up.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return y

    def gather(self) -> None:
        """Make the kernel and its adapter whole over fsdp, floats in the compute dtype.

        For a program that multiplies by them many times, whose own module this is: where fsdp cuts
        them its devices would fetch them each time. It is then no module to train.
        """
        for param in (self.kernel, self.lora_a, self.lora_b):
            if param is not None:
                gather(param, self.dtype)
        if self.kernel_scale is not None:
            gather(self.kernel_scale)

    def _quantized(self, x: Array, codes: Array, scale: Array) -> Array:
        if self.kind == "nf4":
            kernel = nf4.dequantize(codes, scale, self.d_in, 0, self.dtype)
            return _contract(x, kernel, self.n_in)
        # Sums of steps are hundreds of times what they stand for: float16 ends at 65,504.
        wide = jnp.float32 if jnp.dtype(self.dtype) == jnp.float16 else None
        y = _contract(x, codes.astype(self.dtype), self.n_in, wide)
        return (y * scale).astype(self.dtype)


def _contract(x: Array, kernel: Array, n: int, dtype=None) -> Array:
    """Contract the last n axes of x and the first n of a kernel; dtype: the result's or None."""
    if several_devices() or jax.default_backend() != "cpu" or not _AS_MATRICES.get():
        axes = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        return jax.lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=dtype)
    # As matrices: of several axes, XLA's CPU backend transposes x for the gradient of the kernel,
    # and the kernel for that of x, before it multiplies.
    rows, d_out = x.shape[: x.ndim - n], kernel.shape[n:]
    size = math.prod(x.shape[x.ndim - n :])
    matrices = x.reshape(math.prod(rows), size), kernel.reshape(size, math.prod(d_out))
    y = _matmul(*matrices) if dtype is None else jnp.matmul(*matrices, preferred_element_type=dtype)
    return y.reshape(*rows, *d_out)


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
    """Multiply [r, i] by [i, o] on a CPU, where a tall kernel's gradient is made transposed."""
    return x @ kernel


def _matmul_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals, grad):
    x, kernel = residuals
    if kernel.shape[0] <= kernel.shape[1]:
        d_kernel = x.T @ grad
    else:  # a third faster. Without the barrier XLA would turn the product around again.
        d_kernel = jax.lax.optimization_barrier(grad.T @ x).T
    return grad @ kernel.T, d_kernel


_matmul.defvjp(_matmul_forward, _matmul_backward)
