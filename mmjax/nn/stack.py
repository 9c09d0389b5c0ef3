"""Stack equal layers into one module and scan over it, with rematerialisation by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import checkpoint_policies as policies

from mmjax.nn.linear import layer_dropout

# What the backward pass finds saved; everything else is computed again.
REMAT = {
    "off": None,  # save all: most memory, and its traffic costs more than the recomputation saves
    # What matmuls and attention return, nothing else: no matmul runs twice.
    "names": policies.save_only_these_names("qkv", "attn_out", "attn_lse", "attn_sum", "mlp_up"),
    "dots": policies.dots_with_no_batch_dims_saveable,
    "full": policies.nothing_saveable,
}


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Build ``layers`` copies of a module as one, each parameter with a leading layers axis."""
    make = nnx.transform_metadata(make, in_axes=0, out_axes=0, partition="layers")
    return nnx.split_rngs(splits=layers)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def unstack(layers: nnx.Module, count: int) -> tuple[nnx.Module, ...]:
    """Return stacked layers as ``count`` modules, each with parameters of its own."""
    graphdef, state = nnx.split(layers)
    return tuple(nnx.merge(graphdef, jax.tree.map(lambda x: x[i], state)) for i in range(count))  # noqa: B023


def scan(
    layers: nnx.Module,
    count: int,
    step: Callable,
    carry,
    *,
    remat: str = "off",
    last: Callable | None = None,
):
    """Run ``carry = step(layer, carry, index)`` over stacked layers.

    The carry may hold the stacked cache: as scan inputs and outputs it would be copied each step.
    last: runs in place of ``step`` on the last layer, and may return a carry of another shape. The
    weights of the layers before it are copied then.
    """
    if remat not in REMAT:
        raise ValueError(f"remat policy {remat!r} is unknown; one of {', '.join(REMAT)}")
    graphdef, state = nnx.split(layers)

    def body_of(step):
        def body(carry, xs):
            index, leaves = xs
            with layer_dropout(index):
                return step(nnx.merge(graphdef, leaves), carry, index), None

        if remat == "off":
            return body
        return jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)

    xs = (jnp.arange(count), state)
    if last is None:
        return jax.lax.scan(body_of(step), carry, xs)[0]
    if count > 1:
        carry = jax.lax.scan(body_of(step), carry, jax.tree.map(lambda x: x[:-1], xs))[0]
    return body_of(last)(carry, jax.tree.map(lambda x: x[-1], xs))[0]
