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
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from mmjax.models import registry
from mmjax.nn import paths
from mmjax.nn.linear import adapter_dropout, axes_apart
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import RULES, batch_sharding
from mmjax.runtime import USABLE
from mmjax.train import frozen as frozen_part
from mmjax.train import matrices, optim, tuning
from mmjax.train import rows as trained_rows
from mmjax.train import state as train_state
from mmjax.train.build import absent_files, blueprint, maker
from mmjax.train.loss import loss_sum
from mmjax.train.settings import ModelSettings, RunSettings
from mmjax.train.step import compile_step, make_train_step
from mmjax.types import MMJaxError

PARTS = {
    "trained": "trained parameters",
    "frozen": "frozen parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "batch": "batch",
    "kept": "activations kept for the backward pass",
    "layer": "one layer while it is differentiated",
    "head": "logits of one chunk and their gradient",
    "multiplied": "the largest kernel multiplied out",
    "gathered": "weights gathered from other devices",
}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device, by the keys of ``PARTS``.

    mesh: devices by axis. tokens: of a microbatch on each device. kinds: dtypes of trained and
    frozen parameters and of the optimizer's arrays. parameters: (trained, all). compiled: what the
    compiler counts, None where the step was not compiled. note: what stands in for the recipe's.
    """

    name: str
    mesh: dict[str, int]
    tokens: int
    remat: str
    parts: dict[str, int]
    kinds: dict[str, str]
    parameters: tuple[int, int]
    compiled: int | None = None
    note: str = ""

    @property
    def total(self) -> int:
        """The compiler's count, or else the sum of the parts."""
        return sum(self.parts.values()) if self.compiled is None else self.compiled


def make_plan(
    settings: RunSettings, devices: Sequence[jax.Device] | None = None, *, compile_: bool = False
) -> MemoryPlan:
    """Plan a run on some devices, all by default; they are counted and not used.

    compile_: also compile the step for them and ask the compiler. Raises MMJaxError as ``run`` does
    for a mesh or a batch that does not divide.
    """
    mesh = make_mesh(settings.mesh, devices)
    data, accumulate = settings.data, settings.accumulate
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if data.batch_size % (accumulate * ways):
        raise MMJaxError(
            f"data.batch_size {data.batch_size} does not divide into accumulate {accumulate} x "
            f"data x fsdp {ways}; choose a multiple of {accumulate * ways}"
        )
    with use(mesh):
        settings, _ = tuning.applied(settings)
        make, config, processor, known, note = _model(settings)
        names = list(paths.flatten(nnx.state(nnx.eval_shape(make))))
        chosen = train_state.chosen_by(settings, names)
        optim.check_decay(settings.optim, names)
        optim.by_rate(settings.optim, chosen)
        tx = optim.make_optimizer(settings.optim, settings.steps)
        graphdef, state, frozen = train_state.abstract_state(make, chosen, tx, mesh)
        frozen = frozen_part.cast_abstract(frozen, settings.model.frozen_dtype)
        batch = _batch(settings, processor, data.batch_size, mesh)
        rows = {}
        if known is not None:  # without its tokenizer, a table counts whole
            rows = trained_rows.resolve(
                settings.train_rows, state.params, known.processor, known.new_rows
            )
        compiled = None
        if compile_:
            rate = optim.schedule(settings.optim, settings.steps)
            fn = make_train_step(
                graphdef, tx, rate,
                accumulate=accumulate, loss_chunk=settings.loss_chunk, rows=rows,
            )  # fmt: skip
            step = compile_step(fn, state)
            with axes_apart():  # the program of other devices, as what it is held beside
                found = step.lower(state, frozen, batch).compile().memory_analysis()
            compiled = found.argument_size_in_bytes + found.temp_size_in_bytes
            compiled += found.output_size_in_bytes - found.alias_size_in_bytes
    micro = data.batch_size // accumulate // ways
    gradients = _bytes(state.params) * (2 if accumulate > 1 else 1)
    parts = {
        "trained": _bytes(state.params),
        "frozen": _bytes(frozen),
        "gradients": gradients,
        "optimizer": _bytes(state.opt),
        "batch": _bytes(batch),
        **_activations(settings, config, processor, state.params, frozen, mesh, micro),
        "multiplied": _multiplied(settings, frozen),
        "gathered": _gathered(settings, state.params, frozen, mesh),
    }
    return MemoryPlan(
        settings.name,
        dict(mesh.shape),
        micro * data.seq_len // mesh.shape["context"],
        settings.model.remat,
        parts,
        {
            "trained": settings.model.param_dtype,
            "frozen": settings.model.frozen_dtype,
            "optimizer": f"{settings.optim.name}, momentum {optim.mu_dtype(settings.optim)}",
        },
        (
            sum(
                trained_rows.count(rows, name, x.shape)
                for name, x in paths.flatten(state.params).items()
            ),
            sum(frozen_part.sizes(state.params, frozen).values()),
        ),
        compiled,
        note,
    )


def _model(settings: RunSettings):
    """Return (make, config, processor, blueprint, note) of the recipe's folder.

    Where that is not here, it is of the family's own sizes, the processor has a tokenizer of one
    word, and there is no blueprint.
    """
    model = settings.model
    if absent := absent_files(model):
        family = registry.family(model.family)
        config = family.Config.from_hf(model.plan_config | model.config)
        processor = family.Processor.for_words(("word",), config).with_options(**model.processor)
        sizes = "the recipe's" if model.plan_config else f"{model.family}'s"
        choose = partial(train_state.chosen_by, settings)
        make, _ = maker(model, settings.lora, config, settings.seed, choose)
        note = f"{absent[0]} is not here: {sizes} own sizes"
        return make, config, processor, None, note
    choose = partial(train_state.chosen_by, settings)
    plan = blueprint(model, settings.lora, settings.seed, choose)
    return plan.make, plan.config, plan.processor, plan, ""


def _batch(settings: RunSettings, processor, rows: int, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    data = settings.data
    length, patches = (rows, data.seq_len), (rows, data.max_patches, processor.patch_dim)
    shapes = dict.fromkeys(("tokens", "positions", "visual_index", "segment_ids"), length)
    shapes |= {"target_index": (rows, data.max_targets), "patches": patches}
    return {
        name: jax.ShapeDtypeStruct(
            shape,
            np.uint8 if name == "patches" else np.int32,
            sharding=batch_sharding(mesh, name),
        )
        for name, shape in shapes.items()
    }


def _bytes(tree) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


# --- Activations ---------------------------------------------------------------------------------


def _activations(
    settings: RunSettings, config, processor, params, frozen, mesh, rows: int
) -> dict[str, int]:
    """Return what is kept for the backward pass, and what one layer and the head need."""
    data = settings.data
    targets = rows * data.max_targets  # of one device's rows, which context shares
    own = targets // mesh.shape["context"]
    chunked = own > settings.loss_chunk
    trace = dict(rows=rows, chunk=max(1, targets // 2) if chunked else targets)
    cut = _Cut(settings, params, frozen, mesh, rows)
    kept = _residuals(settings, settings.model, config, processor, **trace)
    everything = dataclasses.replace(settings.model, remat="off")
    every = _residuals(settings, everything, config, processor, **trace)

    def in_stack(some: list[jax.ShapeDtypeStruct], size: int) -> int:
        return sum(cut.bytes(r) for r in some if cut.in_stack(r, size))

    tensor = mesh.shape["tensor"]
    logits = min(own, settings.loss_chunk)
    return {
        "kept": sum(map(cut.bytes, kept)),
        # What was not kept is there again while its layer is differentiated, and gradients of all.
        # Where layers stand in groups it is a whole group: more than is there at once.
        "layer": max((2 * in_stack(every, n) - in_stack(kept, n)) // n for n in cut.stacks),
        "head": 2 * logits * config.vocab_size * 4 // tensor,
    }


def _residuals(
    settings: RunSettings, model: ModelSettings, config, processor, rows: int, chunk: int
) -> list[jax.ShapeDtypeStruct]:
    """Return the arrays that the backward pass of one device's rows finds saved.

    They are the outputs of the traced forward pass of ``jax.vjp`` that are not its inputs.
    """
    with use() as one:
        choose = partial(train_state.chosen_by, settings)
        make, _ = maker(model, settings.lora, config, settings.seed, choose)
        names = list(paths.flatten(nnx.state(nnx.eval_shape(make))))
        chosen = train_state.chosen_by(settings, names)
        graphdef, params, frozen = train_state.split(nnx.eval_shape(make), chosen)
        frozen = frozen_part.cast_abstract(frozen, model.frozen_dtype)
        batch = _batch(settings, processor, rows, one)

        def forward(params, frozen, batch):
            def loss(params):
                with adapter_dropout(jax.random.key(0)):  # its masks may be kept as well
                    return loss_sum(nnx.merge(graphdef, params, frozen), batch, chunk=chunk)[0]

            return jax.vjp(loss, params)[1]

        with axes_apart():
            jaxpr = jax.make_jaxpr(forward)(params, frozen, batch).jaxpr
    inputs, found = set(map(id, (*jaxpr.invars, *jaxpr.constvars))), {}
    for eqn in jaxpr.eqns:  # the same memory in another shape, such as layers in groups
        if eqn.primitive.name == "reshape" and id(eqn.invars[0]) in inputs:
            inputs.add(id(eqn.outvars[0]))
    for var in jaxpr.outvars:
        if hasattr(var, "aval") and not hasattr(var, "val") and id(var) not in inputs:
            found[id(var)] = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
    return list(found.values())


class _Cut:
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


def _multiplied(settings: RunSettings, frozen) -> int:
    """Return the bytes of the largest quantised kernel, a layer's, as its map multiplies by it."""
    largest, compute = 0, jnp.dtype(settings.model.dtype).itemsize
    for _, variable in nnx.to_flat_state(frozen):
        if "quantized" not in variable.get_metadata():
            continue
        x, layered = jax.tree.leaves(variable)[0], "layers" in matrices.axes_of(variable)
        count = math.prod(x.sharding.shard_shape(x.shape)) // (x.shape[0] if layered else 1)
        largest = max(largest, count * frozen_part.pairs(x) * compute)
    return largest


def _gathered(settings: RunSettings, params, frozen, mesh) -> int:
    """Return the bytes of weights that are whole for a moment, where fsdp cuts them.

    A layer's in the dtype of the computation, and the largest map outside of the layers with the
    gradient that is summed over the devices.
    """
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1:
        return 0
    compute, layer, largest = jnp.dtype(settings.model.dtype).itemsize, 0, 0
    for tree, more in ((params, 2), (frozen, 1)):
        for variable in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable)):
            axes, x = matrices.axes_of(variable) or (), jax.tree.leaves(variable)[0]
            whole = math.prod(x.sharding.shard_shape(x.shape)) * (fsdp if "embed" in axes else 1)
            if "layers" in axes:
                layer += whole // x.shape[0] * compute * frozen_part.pairs(x)
            else:
                largest = max(largest, whole * x.dtype.itemsize * more)
    return layer + largest


# --- What is printed -----------------------------------------------------------------------------


def table(plan: MemoryPlan) -> Table:
    """Lay a plan out, in GB of 10**9 bytes on each device; a small one in MB."""
    scale, unit = (1e9, "GB") if sum(plan.parts.values()) >= 1e9 else (1e6, "MB")
    shown = Table(box=box.SIMPLE_HEAD)
    for column, side in ((f"{plan.name}, on each device", "left"), (unit, "right"), ("", "left")):
        shown.add_column(column, justify=side)
    notes = dict(plan.kinds) | {
        "kept": f"remat {plan.remat}: {plan.parts['kept'] / plan.tokens / 1e6:.2f} MB a token",
        "layer": "estimate",
        "head": "estimate",
        "multiplied": "estimate",
        "gathered": "estimate",
    }
    for part, words in PARTS.items():
        if plan.parts[part]:
            shown.add_row(words, f"{plan.parts[part] / scale:.2f}", notes.get(part, ""))
    shown.add_section()
    shown.add_row("sum", f"{sum(plan.parts.values()) / scale:.2f}", "")
    if plan.compiled is not None:
        shown.add_row("the compiled step, as XLA counts", f"{plan.compiled / scale:.2f}", "")
    return shown


def facts(plan: MemoryPlan) -> list[str]:
    """Return the lines above the table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    trained, everything = plan.parameters
    lines = [
        f"mesh {mesh}; {plan.tokens:,} tokens of a microbatch on each device",
        f"{everything:,} parameters, {trained:,} of them trained",
    ]
    return [*lines, plan.note] if plan.note else lines


def verdict(plan: MemoryPlan, memory: float) -> str:
    """Say whether a plan fits into devices of ``memory`` GB, and if not, what would help."""
    need, room = plan.total / 1e9, memory * USABLE
    if need <= room:
        return f"fits: {need:.1f} GB of {room:.1f} ({USABLE:.0%} of {memory:g} GB)"
    help_ = {
        "remat": ("model.remat=full", plan.parts["kept"] if plan.remat != "full" else 0),
        "rows": ("a smaller data.batch_size or data.seq_len", plan.parts["kept"]),
        "optimizer": ("optim.name=adafactor", plan.parts["optimizer"]),
        "devices": ("more devices on fsdp", plan.parts["trained"] + plan.parts["optimizer"]),
    }
    best = sorted(help_.values(), key=lambda x: -x[1])[:3]
    ways = ", ".join(words for words, size in best if size > 0.1e9) or "larger devices"
    return (
        f"does not fit: {need:.1f} GB, and {room:.1f} are there ({USABLE:.0%} of {memory:g} GB); "
        f"what would help most: {ways}"
    )


def print_plan(settings: RunSettings, *, devices: int = 0, memory: float = 0.0) -> None:
    """Print the plan of a run, and whether it fits.

    devices: simulated ones, so many; 0 plans and compiles for those of this machine. memory: GB
    of each; 0 asks the devices, which a CPU does not answer.
    """
    if devices < 0 or memory < 0:
        raise MMJaxError(
            f"--plan_devices is {devices} and --plan_memory {memory}; give positive numbers"
        )
    if devices:
        # Before anything asks for devices: the numbers come from shapes, whatever machine this is.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    chosen = jax.devices()[: devices or None]
    plan = make_plan(settings, chosen, compile_=not devices)
    console = Console(width=100)
    for line in facts(plan):
        console.print(line, soft_wrap=True)
    console.print(table(plan))
    if not memory and not devices:
        memory = ((chosen[0].memory_stats() or {}).get("bytes_limit") or 0) / USABLE / 1e9
    if memory:
        console.print(verdict(plan, memory), soft_wrap=True)
    else:
        console.print("give --plan_memory=GB to be told whether it fits")
