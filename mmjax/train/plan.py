"""The memory plan: what a run needs on each device, before anything is allocated.

Parameters, gradients and optimizer state are exact: their shapes, dtypes and shardings are those of
the run. What is kept for the backward pass is read off the traced program (the residuals of
``jax.vjp`` under the recipe's remat policy), which needs no device of the kind planned for. What
exists only for a moment is an estimate. Where the step can be compiled, for the devices that are
there, the compiler's own count stands beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.models import registry
from mmjax.models.stated_sizes import with_values
from mmjax.nn import paths
from mmjax.nn.linear import axes_apart
from mmjax.parallel.mesh import check_batch, make_mesh, use
from mmjax.train import frozen as frozen_part
from mmjax.train import matrices, optim, tuning
from mmjax.train import rows as trained_rows
from mmjax.train import state as train_state
from mmjax.train.activations import activations
from mmjax.train.build import absent_files, blueprint, maker
from mmjax.train.design import Outline, abstract_batch, check_positions, make_outline
from mmjax.train.lengths import check_lengths
from mmjax.train.loss import LossOptions
from mmjax.train.plan_answer import AnswerPlan, plan_answers
from mmjax.train.settings import RunSettings, check_numbers
from mmjax.train.step import compile_step, make_train_step

PARTS = {
    "trained": "trained parameters",
    "frozen": "frozen parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "summed": "gradients of microbatches",
    "gradients": "gradients",
    "kept": "activations kept for backward",
    "layer": "one layer, differentiated",
    "head": "logits of a chunk",
    "multiplied": "a kernel multiplied out",
    "gathered": "gathered from other devices",
    "turned": "kernels turned to be gathered",
}
MOMENTS = ("loss", "layers", "update")
"""When a step may need most: its backward pass at the loss, in the layers, and behind them."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device, by the keys of ``PARTS`` at each of ``MOMENTS``.

    mesh: devices by axis. tokens: of a microbatch on each device. kinds: dtypes of trained and
    frozen parameters and of the optimizer's arrays. parameters: (trained, all). compiled: what the
    compiler counts, None where the step was not compiled. note: what stands in for the recipe's.
    saved: bytes of a checkpoint, over all devices; stay: how many of them are kept. answers: what
    the model needs to answer.
    """

    name: str
    mesh: dict[str, int]
    tokens: int
    remat: str
    parts: dict[str, tuple[int, int, int]]
    kinds: dict[str, str]
    parameters: tuple[int, int]
    saved: int
    stay: int
    answers: AnswerPlan
    compiled: int | None = None
    note: str = ""

    @property
    def sums(self) -> tuple[int, ...]:
        """What is there at each moment."""
        return tuple(map(sum, zip(*self.parts.values(), strict=True)))

    @property
    def total(self) -> int:
        """The compiler's count, or else the most that is there at a moment."""
        return max(self.sums) if self.compiled is None else self.compiled

    def most(self, part: str) -> int:
        """Return the most bytes of a part at a moment."""
        return max(self.parts[part])


def make_plan(
    settings: RunSettings, devices: Sequence[jax.Device] | None = None, *, compile_: bool = False
) -> MemoryPlan:
    """Plan a run on some devices, all by default; they are counted and not used.

    compile_: also compile the step for them and ask the compiler. Raises MMJaxError as ``run`` does
    for numbers that cannot work, a mesh or a batch that does not divide, and rows that are too long
    for the model.
    """
    check_numbers(settings)
    mesh = make_mesh(settings.mesh, devices)
    data = settings.data
    check_batch(mesh, data.batch_size, data.seq_len, settings.accumulate)
    check_lengths(data, mesh)
    with use(mesh):
        settings, _ = tuning.applied(settings)
        make, config, processor, known, note = _model(settings)
        check_positions(config, data.seq_len)
        outline = make_outline(settings, make, mesh)
        batch = abstract_batch(settings, processor, data.batch_size, mesh)
        rows = {}
        if known is not None:  # without its tokenizer, a table counts whole
            rows = trained_rows.resolve(
                settings.train_rows, outline.state.params, known.processor, known.new_rows
            )
        compiled = _compiled(settings, outline, batch, rows) if compile_ else None
    micro = data.batch_size // settings.accumulate // (mesh.shape["data"] * mesh.shape["fsdp"])
    return MemoryPlan(
        settings.name,
        dict(mesh.shape),
        micro * data.seq_len // mesh.shape["context"],
        settings.model.remat,
        _parts(settings, outline, config, processor, batch, mesh, micro),
        {
            "trained": settings.model.param_dtype,
            "frozen": settings.model.frozen_dtype,
            "optimizer": f"{settings.optim.name}, momentum {optim.mu_dtype(settings.optim)}",
        },
        _count(outline, rows),
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(outline.state)),
        settings.checkpoint.keep + bool(settings.checkpoint.best),
        plan_answers(settings.model.family, config, data.seq_len),
        compiled,
        note,
    )


def _compiled(settings: RunSettings, outline: Outline, batch, rows) -> int:
    """Return the bytes that the compiled step needs on a device, as the compiler counts them."""
    fn = make_train_step(
        outline.graphdef, outline.tx, outline.schedule,
        loss=LossOptions(chunk=settings.loss_chunk), accumulate=settings.accumulate, rows=rows,
    )  # fmt: skip
    step = compile_step(fn, outline.state)
    with axes_apart():  # the program of other devices, as what it is held beside
        found = step.lower(outline.state, outline.frozen, batch).compile().memory_analysis()
    held = found.argument_size_in_bytes + found.temp_size_in_bytes
    return held + found.output_size_in_bytes - found.alias_size_in_bytes


def _parts(
    settings: RunSettings, outline: Outline, config, processor, batch, mesh, rows: int
) -> dict[str, tuple[int, int, int]]:
    """Return the bytes of each of ``PARTS`` at each of ``MOMENTS``.

    rows: of a microbatch on each device.
    """
    params, frozen = outline.state.params, outline.frozen
    found = activations(settings, config, processor, params, frozen, mesh, rows)
    throughout = {
        "trained": _bytes(params),
        "frozen": _bytes(frozen),
        "optimizer": _bytes(outline.state.opt),
        "batch": _bytes(batch),
        # In float32, beside the newest ones.
        "summed": _bytes(params, 4) if settings.accumulate > 1 else 0,
    }
    gradients = _bytes(params)
    outside = _bytes([v for v in _variables(params) if "layers" not in _axes(v)])
    layers, largest, derivative = _gathered(settings, params, frozen, mesh)
    turned = _turned(params, frozen, mesh)
    return {part: (size,) * 3 for part, size in throughout.items()} | {
        # Those of embedding and head: chunks of the head sum theirs up before the layers' turn;
        # otherwise logits wait, and theirs is made where activations lay. Where fsdp cuts them the
        # whole one counts as gathered.
        "gradients": (
            0 if derivative else outside,
            gradients - (0 if found["chunked"] else outside),
            gradients,
        ),
        "kept": (found["kept"], found["kept"], 0),
        "layer": (0, found["layer"], 0),
        "head": (found["head"], 0, 0),
        "multiplied": (*_multiplied(settings, frozen), 0),
        "gathered": (largest + derivative, layers, derivative),
        "turned": (turned, turned, 0),
    }


def _count(outline: Outline, rows) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are."""
    params = outline.state.params
    trained = (trained_rows.count(rows, n, x.shape) for n, x in paths.flatten(params).items())
    return sum(trained), sum(frozen_part.sizes(params, outline.frozen).values())


def _model(settings: RunSettings):
    """Return (make, config, processor, blueprint, note) of the recipe's folder.

    Where that is not here, it is of the family's own sizes, the processor has a tokenizer of one
    word, and there is no blueprint.
    """
    model = settings.model
    if absent := absent_files(model):
        family = registry.family(model.family)
        config = family.Config.from_hf(with_values(model.plan_config, model.config))
        processor = family.Processor.for_words(("word",), config).with_options(**model.processor)
        sizes = "the recipe's" if model.plan_config else f"{model.family}'s"
        choose = partial(train_state.chosen_by, settings)
        make, _ = maker(model, settings.lora, config, settings.seed, choose)
        note = f"{absent[0]} is not here: {sizes} own sizes"
        return make, config, processor, None, note
    choose = partial(train_state.chosen_by, settings)
    plan = blueprint(model, settings.lora, settings.seed, choose)
    return plan.make, plan.config, plan.processor, plan, ""


def _bytes(tree, itemsize: int | None = None) -> int:
    """Bytes of a tree of abstract arrays on a device; itemsize: of a number, None for their own."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def _multiplied(settings: RunSettings, frozen) -> tuple[int, int]:
    """Return the bytes of the largest quantised kernel, as its map multiplies by it.

    The first is of those outside of the layers, the second of a layer's.
    """
    largest, compute = [0, 0], jnp.dtype(settings.model.dtype).itemsize
    for _, variable in nnx.to_flat_state(frozen):
        if "quantized" not in variable.get_metadata():
            continue
        x, layered = jax.tree.leaves(variable)[0], "layers" in _axes(variable)
        count = math.prod(x.sharding.shard_shape(x.shape)) // (x.shape[0] if layered else 1)
        largest[layered] = max(largest[layered], count * frozen_part.pairs(x) * compute)
    return largest[0], largest[1]


def _gathered(settings: RunSettings, params, frozen, mesh) -> tuple[int, int, int]:
    """Return the bytes of what is whole for a moment, where fsdp cuts it.

    They are the weights of two layers, for the next one's come while one computes (``runtime``),
    the largest map outside of the layers, and its gradient, which is summed over the devices; all
    in the dtype of the computation. A table of embeddings is looked up where it lies, and is whole
    only as the head.
    """
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1:
        return 0, 0, 0
    compute, layers, largest = jnp.dtype(settings.model.dtype).itemsize, 0, (0, 0)
    variables = [(v, True) for v in _variables(params)] + [(v, False) for v in _variables(frozen)]
    tied = not any(_axes(v) == ("embed", "vocab") for v, _ in variables)
    for variable, trained in variables:
        axes, x = _axes(variable), jax.tree.leaves(variable)[0]
        if axes == ("vocab", "embed") and not tied:
            continue
        whole = math.prod(x.sharding.shard_shape(x.shape)) * (fsdp if "embed" in axes else 1)
        size = whole * compute * frozen_part.pairs(x)
        if "layers" in axes:
            layers += 2 * size // x.shape[0]
        else:
            largest = max(largest, (size, size if trained else 0), key=sum)
    return layers, *largest


def _turned(params, frozen, mesh) -> int:
    """Return the bytes of the layers' kernels that fsdp cuts along another than their first axis.

    A collective gathers along the axis that lies outermost in memory, so XLA copies the kernels of
    all layers into that order before the first.
    """
    if mesh.shape["fsdp"] == 1:
        return 0
    found = [v for v in _variables((params, frozen)) if "embed" in _axes(v)[2:]]
    return _bytes([v for v in found if "layers" in _axes(v)])


def _variables(tree) -> list[nnx.Variable]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    return matrices.axes_of(variable) or ()
