"""The position-wise feed-forward block."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.parallel.sharding import constrain


def squared_relu(x: Array) -> Array:
    """Return relu(x) squared (So et al. 2021), Persimmon's activation."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu2": squared_relu}


class MLP(nnx.Module):
    """down(activation(up(x))), both maps with bias."""

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
    ):
        shared = dict(bias=True, dtypes=dtypes, init_std=init_std, lora=lora, rngs=rngs)
        self.activation = activation
        self.up = Linear((d,), (f,), ("embed", "mlp"), name="mlp.up", **shared)
        self.down = Linear((f,), (d,), ("mlp", "embed"), name="mlp.down", **shared)

    def __call__(self, x: Array) -> Array:
        """Map [b, t, d] to [b, t, d]."""
        hidden = checkpoint_name(constrain(self.up(x), "batch", "length", "mlp"), "mlp_up")
        return self.down(ACTIVATIONS[self.activation](hidden))
