"""The position-wise feed-forward block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.norm import LayerNorm, RMSNorm
from mmjax.parallel.sharding import constrain
from mmjax.types import MMJaxError


def squared_relu(x: Array) -> Array:
    """Return relu(x) squared (So et al. 2021), Persimmon's activation."""
    return jnp.square(jax.nn.relu(x))


def quick_gelu(x: Array) -> Array:
    """Return x sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu2": squared_relu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}


def check_activation(name: Any, where: str, *more: str) -> None:
    """Raise MMJaxError for an activation that is none of ``ACTIVATIONS`` nor of ``more``.

    where: who names it.
    """
    good = tuple(dict.fromkeys((*ACTIVATIONS, *more)))
    if name not in good:
        known = ", ".join(good)
        raise MMJaxError(f"{where} says activation {name!r}, which is unknown; one of {known}")


class MLP(nnx.Module):
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)) (Shazeer 2020).

    sub_norm: a norm of what ``down`` is given, over f.
    """

    def __init__(
        self,
        d: int,
        f: int,
        *,
        activation: str,
        dtypes: DTypes,
        init_std: float,
        lora: LoRA | None,
        rngs: nnx.Rngs,
        gated: bool = False,
        bias: bool = True,
        sub_norm: LayerNorm | RMSNorm | None = None,
        prefix: str = "",
    ):
        shared = dict(bias=bias, dtypes=dtypes, init_std=init_std, lora=lora, rngs=rngs)
        check_activation(activation, f"{prefix}mlp")
        self.activation = activation
        widen = (d,), (f,), ("embed", "mlp")
        self.up = Linear(*widen, name=f"{prefix}mlp.up", **shared)
        self.gate = Linear(*widen, name=f"{prefix}mlp.gate", **shared) if gated else None
        self.sub_norm = sub_norm
        self.down = Linear((f,), (d,), ("mlp", "embed"), name=f"{prefix}mlp.down", **shared)

    def __call__(self, x: Array, times: Array | None = None) -> Array:
        """Map [b, t, d] to [b, t, d].

        times: a trained number that what is returned is multiplied by. ``down`` is given the
        product: after it, the number's gradient would be made of what ``down`` returns, for which
        remat would run it again.
        """
        act = ACTIVATIONS[self.activation]
        up = _hidden(self.up(x))
        hidden = act(up) if self.gate is None else act(_hidden(self.gate(x))) * up
        hidden = hidden if self.sub_norm is None else self.sub_norm(hidden)
        return self.down(hidden if times is None else times * hidden)


def _hidden(x: Array) -> Array:
    return checkpoint_name(constrain(x, "batch", "length", "mlp"), "mlp_up")
