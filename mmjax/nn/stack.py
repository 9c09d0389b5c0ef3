"""Stack equal layers into one module and scan over it, with rematerialisation by name."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import checkpoint_policies as policies

from mmjax.nn import dropout
from mmjax.ops import flash_cudnn

_NAMED = policies.save_only_these_names("qkv", "attn_out", "attn_lse", "attn_sum", "mlp_up")

# What the backward pass finds saved; everything else is computed again.
REMAT = {
    "off": None,  # save all: most memory, and its traffic costs more than the recomputation saves
    # What matmuls and attention return, nothing else: no matmul runs twice but adapters' low ones.
    "names": policies.save_from_both_policies(_NAMED, flash_cudnn.keeps_residuals),
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

    def take(i: int) -> nnx.State:
        def one(x: nnx.Variable) -> nnx.Variable:
            return x.replace(x[...][i], out_sharding=x.get_metadata()["out_sharding"][1:])

        return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))

    return tuple(nnx.merge(graphdef, take(i)) for i in range(count))


@dataclasses.dataclass(frozen=True)
class Between:
    """Blocks that stand between the layers of a stack: one before each ``every``-th layer.

    blocks: [layers // every] stacked blocks, or a tuple of as many. step: ``carry = step(block,
    carry, index)``, run before layer ``index * every + every - 1``.
    """

    blocks: nnx.Module | tuple[nnx.Module, ...]
    every: int
    step: Callable

    def before(self, layer: int, carry):
        """Run the block that stands before a layer, if one does; ``blocks`` is a tuple here."""
        if (layer + 1) % self.every:
            return carry
        index = layer // self.every
        return self.step(self.blocks[index], carry, index)


def scan(
    layers: nnx.Module,
    count: int,
    step: Callable,
    carry,
    *,
    remat: str = "off",
    unroll: int = 1,
    last: Callable | None = None,
    between: Between | None = None,
):
    """Run ``carry = step(layer, carry, index)`` over stacked layers.

    The carry may hold the stacked cache: as scan inputs and outputs it would be copied each step.
    unroll: iterations of the scan that are compiled as one, of which XLA may overlap the ends;
    compilation takes as many times longer.
    last: runs in place of ``step`` on the last layer, and may return a carry of another shape. The
    weights of the layers before it are copied then. between: blocks among the layers; the scan
    then goes over groups of ``every`` layers and a block.
    """
    if remat not in REMAT:
        raise ValueError(f"remat policy {remat!r} is unknown; one of {', '.join(REMAT)}")
    every = 1 if between is None else between.every
    graphdef, state = nnx.split(layers)
    block_def, block_state = nnx.split(None if between is None else between.blocks)

    def run(definition, step, at: int | None = None):
        def one(carry, leaves, index):
            # Inside of what is computed again: a slice made outside would be kept, a copy of all
            # weights, where the scan's own slices are not.
            leaves = leaves if at is None else jax.tree.map(lambda x: x[at], leaves)
            with dropout.of_layer(index):
                return step(nnx.merge(definition, leaves), carry, index)

        if remat == "off":
            return one
        return jax.checkpoint(one, policy=REMAT[remat], prevent_cse=False)

    def group(last_step):
        """Return a scan's body over (group's index, its layers [every, ...], its block)."""

        def body(carry, xs):
            index, leaves, block = xs
            for i in range(every):
                if between is not None and i == every - 1:
                    carry = run(block_def, between.step)(carry, block, index)
                which = step if i < every - 1 else last_step
                at = None if every == 1 else i
                carry = run(graphdef, which, at)(carry, leaves, index * every + i)
            return carry, None

        return body

    groups, rest = divmod(count, every)
    grouped = jax.tree.map(lambda x: x if len(x) == count else x[:count], state)
    if every > 1:  # for an axis of one layer, XLA's CPU backend would copy all weights
        grouped = jax.tree.map(
            lambda x: x[: groups * every].reshape(groups, every, *x.shape[1:]), state
        )
    xs = (jnp.arange(groups), grouped, block_state)
    cut_last = last is not None and not rest
    if not cut_last:
        carry = jax.lax.scan(group(step), carry, xs, unroll=unroll)[0]
    else:
        if groups > 1:
            head = jax.tree.map(lambda x: x[:-1], xs)
            carry = jax.lax.scan(group(step), carry, head, unroll=unroll)[0]
        carry = group(last)(carry, jax.tree.map(lambda x: x[-1], xs))[0]
    for i in range(groups * every, count):
        which = last if last is not None and i == count - 1 else step
        carry = run(graphdef, which, i)(carry, state, i)
    return carry
