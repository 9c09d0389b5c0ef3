"""The shard suite: the train step on simulated devices; collectives and bytes, no speed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import cases
from bench.cases import TINY, Case, Size

MESHES = ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "fsdp": 4})
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all",
)  # fmt: skip
BOUND = 1e-5
"""Of the relative difference of a mesh's losses from those of one device."""


def shard_cases(quick: bool, device: str) -> list[Case]:
    """Return a case for each mesh; all run on eight simulated devices of the CPU."""
    options = {"b": 8, "t": 32 if quick else 256, "targets": 8 if quick else 64}
    return [
        Case(
            "shard",
            " x ".join(f"{axis} {ways}" for axis, ways in mesh.items()),
            options | {"mesh": mesh},
            work=options["b"] * options["t"],
            unit="tokens",
            bound=BOUND,
            size=TINY if quick else Size(),
            peers=(),
            device="8 cpus",
        )
        for mesh in MESHES
    ]


class Shard:
    """``mmjax.train.step`` of a Fuyu, compiled on the mesh of a case."""

    def __init__(self, case: Case, folder: str, impl: str):
        self.case = case

    def survey(self) -> dict[str, Any]:
        """Return collectives by kind, bytes of one device, and the difference from one device."""
        o = self.case.options
        compiled, compile_s, losses = run(self.case, o["mesh"])
        b, t, targets = o["b"], o["t"], o["targets"]
        alone = _losses_alone(self.case.size, b, t, targets)
        memory = compiled.memory_analysis()
        return {
            "compile_s": round(compile_s, 2),
            "collectives": count_collectives(compiled.as_text()),
            "argument_size_in_bytes": memory.argument_size_in_bytes,
            "temp_size_in_bytes": memory.temp_size_in_bytes,
            "losses": losses,
            "errors": {"loss": float(np.max(np.abs(np.divide(losses, alone) - 1)))},
        }


@functools.cache
def _losses_alone(size: Size, b: int, t: int, targets: int) -> list[float]:
    """Return the losses of one device; the meshes of a size share them."""
    options = {"b": b, "t": t, "targets": targets}
    return run(Case("shard", "", options, 0, "", BOUND, size=size), {})[2]


def run(case: Case, shape: dict[str, int]) -> tuple[Any, float, list[float]]:
    """Return the compiled train step on a mesh, seconds to compile, and the losses of two steps."""
    from mmjax.parallel.mesh import use

    built, losses = build(case, shape), []
    with use(built.mesh):
        for _ in range(2):
            built.train, metrics = built.compiled(built.train, built.frozen, built.batch)
            losses.append(float(metrics["loss"]))
    return built.compiled, built.compile_s, losses


@dataclasses.dataclass
class Built:
    """A compiled train step, what it is called with, and its mesh; ``train`` is given away."""

    compiled: Any
    compile_s: float
    train: Any
    frozen: Any
    batch: Any
    mesh: Any


def build(case: Case, shape: dict[str, int]) -> Built:
    """Compile the train step of a random Fuyu for the batch of a case, on a mesh."""
    import jax
    from flax import nnx

    from bench.ours import LEARNING_RATE
    from mmjax.nn import paths
    from mmjax.parallel.mesh import make_mesh, use
    from mmjax.parallel.sharding import put_batch
    from mmjax.train import optim, state, step

    settings = optim.OptimSettings(lr=LEARNING_RATE, schedule="constant", warmup=0)
    tx = optim.make_optimizer(settings, 100)
    make = maker(case.size)
    with use(make_mesh(shape, jax.devices()[: math.prod(shape.values())])) as mesh:
        chosen = set(paths.flatten(nnx.state(nnx.eval_shape(make))))
        graphdef, train, frozen = state.init(make, chosen, tx, mesh)
        train_step = step.make_train_step(graphdef, tx, optim.schedule(settings, 100))
        batch = put_batch(cases.train_batch(case), mesh, case.options["b"])
        begun = time.perf_counter()
        compiled = step.compile_step(train_step, train).lower(train, frozen, batch).compile()
        return Built(compiled, time.perf_counter() - begun, train, frozen, batch, mesh)


def maker(size: Size) -> Callable[[], Any]:
    """Return what makes a random Fuyu of a size."""
    from flax import nnx

    from bench.ours import fuyu_config
    from mmjax.models.fuyu.model import Fuyu

    return lambda: Fuyu(fuyu_config(size), rngs=nnx.Rngs(0))


def count_collectives(program: str) -> dict[str, int]:
    """Count the collectives in the text of a compiled program; one in a loop counts once."""
    kinds = "|".join(COLLECTIVES)
    found = collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", program))
    return {kind: found[kind] for kind in COLLECTIVES}
