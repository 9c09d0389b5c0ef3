"""Activations of a step, for the memory plan: what is kept for the backward pass, and in between.

They are read off the traced program, which needs no device of the kind planned for.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.extend.core.primitives import remat_p, scan_p

from mmjax.nn import paths
from mmjax.nn.dropout import dropout_key
from mmjax.nn.linear import axes_apart
from mmjax.ops import xent
from mmjax.parallel.mesh import use
from mmjax.parallel.sharding import RULES
from mmjax.train import frozen as frozen_part
from mmjax.train import matrices
from mmjax.train import state as train_state
from mmjax.train.build import maker
from mmjax.train.design import abstract_batch
from mmjax.train.loss import loss_sum
from mmjax.train.settings import ModelSettings, RunSettings


def activations(
    settings: RunSettings, config, processor, params, frozen, mesh, rows: int
) -> dict[str, int]:
    """Return the bytes kept for the backward pass, and those that one layer and the head need.

    ``chunked`` tells whether the head runs over several chunks.
    """
    data = settings.data
    targets = rows * data.max_targets  # of one device's rows, which context shares
    own = targets // mesh.shape["context"]
    chunk = xent.chunk_rows(config.vocab_size, settings.loss_chunk)
    chunked = own > chunk
    trace = dict(rows=rows, chunk=max(1, targets // 2) if chunked else targets)
    cut = Cut(settings, params, frozen, mesh, rows)
    program = partial(traced, settings, config=config, processor=processor, **trace)
    kept = residuals(program(settings.model))
    every = residuals(program(dataclasses.replace(settings.model, remat="off")))
    again = layers_in_scans(program(dataclasses.replace(settings.model, remat="full"), False))

    def in_stack(some: list[jax.ShapeDtypeStruct], size: int) -> int:
        return sum(cut.bytes(r) for r in some if cut.in_stack(r, size))

    tensor = mesh.shape["tensor"]
    logits = min(own, chunk) * config.vocab_size // tensor
    return {
        "kept": sum(map(cut.bytes, kept)),
        # What was not kept is there again while its layer is differentiated, and gradients of all.
        # Of layers that a scan takes in groups, one comes behind another.
        "layer": max(
            (2 * in_stack(every, n) - in_stack(kept, n)) // (n * again.get(n, 1))
            for n in cut.stacks
        ),
        # Logits and their gradient, in the dtype of the computation: float32 stays inside of
        # XLA's fusions. Logits of one chunk alone are kept, and counted there.
        "head": (2 if chunked else 1) * logits * jnp.dtype(settings.model.dtype).itemsize,
        "chunked": chunked,
    }


def traced(
    settings: RunSettings,
    model: ModelSettings,
    backward: bool = True,
    *,
    config,
    processor,
    rows: int,
    chunk: int,
) -> Jaxpr:
    """Return the program of one device's loss; backward: what ``jax.vjp`` makes of it."""
    with use() as one:
        choose = partial(train_state.chosen_by, settings)
        make, _ = maker(model, settings.lora, config, settings.seed, choose)
        abstract = nnx.eval_shape(make)
        chosen = train_state.chosen_by(settings, list(paths.flatten(nnx.state(abstract))))
        graphdef, params, frozen = train_state.split(abstract, chosen)
        frozen = frozen_part.cast_abstract(frozen, model.frozen_dtype)
        batch = abstract_batch(settings, processor, rows, one)

        def forward(params, frozen, batch):
            def loss(params):
                with dropout_key(jax.random.key(0)):  # its masks may be kept as well
                    return loss_sum(nnx.merge(graphdef, params, frozen), batch, chunk=chunk)[0]

            return jax.vjp(loss, params)[1] if backward else loss(params)

        with axes_apart():
            return jax.make_jaxpr(forward)(params, frozen, batch).jaxpr


def residuals(jaxpr: Jaxpr) -> list[jax.ShapeDtypeStruct]:
    """Return the arrays that the backward pass of a program of ``jax.vjp`` finds saved.

    They are the outputs of the forward pass that are not its inputs.
    """
    inputs, found = set(map(id, (*jaxpr.invars, *jaxpr.constvars))), {}
    for eqn in jaxpr.eqns:  # the same memory in another shape, such as layers in groups
        if eqn.primitive.name == "reshape" and id(eqn.invars[0]) in inputs:
            inputs.add(id(eqn.outvars[0]))
    for var in jaxpr.outvars:
        if hasattr(var, "aval") and not hasattr(var, "val") and id(var) not in inputs:
            found[id(var)] = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
    return list(found.values())


def layers_in_scans(jaxpr: Jaxpr) -> dict[int, int]:
    """Return how many layers an iteration of a scan runs, by the scan's length.

    They are told by ``jax.checkpoint``, around each of them where a remat policy is at work.
    """
    found: dict[int, int] = {}

    def walk(jaxpr: Jaxpr) -> int:
        layers = 0
        for eqn in jaxpr.eqns:
            inner = sum(map(walk, jaxprs_in_params(eqn.params)))
            if eqn.primitive is remat_p:
                inner = 1
            elif eqn.primitive is scan_p:
                length = eqn.params["length"]
                found[length] = max(found.get(length, 1), inner)
            layers += inner
        return layers

    walk(jaxpr)
    return found


class Cut:
    """How the residuals of one device's rows are cut further, by the axes tensor and context."""

    def __init__(self, settings: RunSettings, params, frozen, mesh, rows: int):
        self.mesh, self.length = mesh, settings.data.seq_len
        leaves = jax.tree.leaves((params, frozen))
        # A parameter that is kept in the dtype of the computation lies as the parameter does.
        self.like = {x.shape: x.sharding for x in leaves if math.prod(x.shape) > 1}
        on_tensor = {axis for axis, to in RULES if to == "tensor"}
        # How many layers each stack has, the shapes of their weights, and what tensor cuts.
        self.stacks, self.weights, self.sizes = set(), set(), set()
        for variable in jax.tree.leaves(
            (params, frozen), is_leaf=lambda x: isinstance(x, nnx.Variable)
        ):
            axes = matrices.axes_of(variable) or ()
            shape = jax.tree.leaves(variable)[0].shape
            for axis, size in zip(axes, shape, strict=True):
                if axis == "layers":
                    self.stacks.add(size)
                    self.weights.add(shape[1:])
                elif axis in on_tensor:
                    self.sizes |= {size, size * rows}  # attention's rows are rows x heads

    def in_stack(self, x: jax.ShapeDtypeStruct, size: int) -> bool:
        """Tell whether a residual is of the layers of a stack of this size, and no weight."""
        layered = len(x.shape) > 2 and x.shape[0] == size
        return layered and x.shape not in self.like and x.shape[1:] not in self.weights

    def bytes(self, x: jax.ShapeDtypeStruct) -> int:
        shape, size = tuple(x.shape), x.dtype.itemsize
        if shape in self.like:
            return math.prod(self.like[shape].shard_shape(shape)) * size
        count = math.prod(shape)
        if set(shape[1:]) & self.sizes:
            count //= self.mesh.shape["tensor"]
        if self.length in shape:
            count //= self.mesh.shape["context"]
        return count * size
