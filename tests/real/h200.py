"""mmjax compiled for an H200 on a machine without a GPU: `make compile-h200`.

Attention's kernels, train steps of recipes and Fuyu-8B's generation at their full sizes go through
XLA's GPU compiler and ptxas; beside what the compiler counts of a step stands what ``--plan``
predicts. Nothing runs: no result, no speed. Autotuning is off, for it would have to run, so other
tiles, and other memory for them, may be chosen on a real one. What is for several GPUs is compiled
by a process of its own, with the flags that runs on several have. Needs Python 3.12 with jax 0.11.2
and the packages that the Makefile names.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.real import h200_target  # before jax, whose plugins it prepares

import jax  # isort: skip
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.config import resolve_recipe
from mmjax.generate import copies, loop
from mmjax.models import registry
from mmjax.nn.linear import DTypes
from mmjax.ops import flash_mosaic, flash_triton
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import parameter_shardings
from mmjax.runtime import SEVERAL_GPUS, USABLE
from mmjax.schema import to_dataclass
from mmjax.train import plan
from mmjax.train.settings import RunSettings
from mmjax.types import MMJaxError

KERNELS = {"triton": flash_triton, "mosaic": flash_mosaic}
HEAD_DIMS = {"triton": (64, 72, 80, 96, 128), "mosaic": (64, 128)}
LENGTH = 2344
"""Tokens of an attention call: in Fuyu, a picture of 1080 x 1920 pixels has 2,340."""
# Recipe, devices, overrides: as docs/memory.md plans them, some for smaller cards than this one.
QLORA = ("model.frozen_dtype=nf4", "model.remat=full", "data.batch_size=1")
OTTER = ("model.remat=full", "data.batch_size=4")
CLEVER = ("model.remat=full", "model.frozen_dtype=int8", "data.batch_size=4")
STEPS = (
    ("fuyu_8b_lora", 1, ()),
    ("fuyu_8b_lora", 1, QLORA),
    ("otterhd_8b", 1, ("data.batch_size=1", "optim.name=adafactor")),
    ("otter_9b", 1, ()),
    ("otter_9b", 4, OTTER),
    ("clever_flamingo_lora", 1, CLEVER),
    ("bunny_phi2_siglip:lora", 8, ()),
    ("fuyu_8b", 8, ()),
    ("otterhd_8b", 8, ()),
)
MOST = 1.2
"""Of what is planned, that a step may need; beyond it a plan misleads."""
PROMPT, ANSWER, PATCHES = 2400, 128, 2304


def attention(name: str, h: int, folder: Path) -> str:
    """Compile attention of h numbers a head with its gradient: packed rows, grouped heads."""
    mesh = make_mesh({}, h200_target.devices(1))
    here = NamedSharding(mesh, PartitionSpec())
    shape = partial(jax.ShapeDtypeStruct, sharding=here)
    q, kv = (shape((2, LENGTH, n, h), jnp.bfloat16) for n in (4, 2))
    at = shape((2, LENGTH), jnp.int32)

    def loss(q, k, v, start, end):
        flash = KERNELS[name].flash_attention
        out = flash(q, k, v, (start, end), None, causal=True, scale=h**-0.5, interpret=False)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with use(mesh), h200_target.assembler_reports(folder):
        jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, kv, kv, at, at).compile()
    told = "".join(file.read_text() for file in sorted(folder.glob("*.ptxas")))
    spilt = sum(map(int, re.findall(r"(\d+) bytes spill stores", told)))
    used = re.findall(r"Used (\d+) registers", told)  # Mosaic's alone: XLA passes on warnings
    most = f", at most {max(map(int, used))} registers a thread" if used else ""
    return f"compiled, {spilt} bytes spilled{most}"


def step(recipe: str, count: int, overrides: tuple[str, ...]) -> str:
    """Compile a recipe's train step, and tell the compiler's count beside the plan's."""
    name, _, arg = recipe.partition(":")
    config = resolve_recipe(f"configs/{name}.py" + (f":{arg}" if arg else ""), overrides)
    settings = to_dataclass(RunSettings, config)
    devices = h200_target.devices(count)
    planned = plan.make_plan(settings, devices).total  # as --plan does, wherever it is asked
    with h200_target.taken_for_default():
        held = plan.make_plan(settings, devices, compile_=True).total
    beside = f"{held / 1e9:6.1f} GB, planned {planned / 1e9:6.1f}, ratio {held / planned:.2f}"
    if held > MOST * planned:
        raise MMJaxError(f"{beside}: more than {MOST} of the plan")
    return f"{beside}; {fits(held)}"


def generation(count: int, copy: str | None) -> str:
    """Compile Fuyu-8B's prefill of ``PROMPT`` tokens and loop over ``ANSWER`` more, bfloat16.

    A prompt a GPU; fsdp cuts the weights, of which ``copy`` is made.
    """
    family = registry.family("fuyu")
    config = family.Config.from_hf({})
    mesh = make_mesh({"fsdp": count}, h200_target.devices(count))
    with use(mesh), h200_target.taken_for_default():
        dtypes = DTypes("bfloat16", "bfloat16")
        model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtypes=dtypes))
        graphdef, params = nnx.split(model)
        params = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            params,
            parameter_shardings(params, mesh),
        )
        length, whole = loop.bucket(PROMPT), NamedSharding(mesh, PartitionSpec())
        shape = partial(jax.ShapeDtypeStruct, sharding=whole)
        tokens = shape((count, length), jnp.int32)
        batch = dict.fromkeys(("tokens", "positions", "visual_index", "segment_ids"), tokens)
        patch_dim = family.Processor.for_words(("word",), config).patch_dim
        batch["patches"] = shape((count, loop.bucket(PATCHES, 1), patch_dim), jnp.uint8)
        how = loop.Generator(graphdef, eos=(2,))
        room = loop.room_for(length, ANSWER)
        one, rows = shape((), jnp.int32), shape((count,), jnp.int32)
        ranking = how.beams.ranking(room)
        draws = (jax.eval_shape(lambda: jax.random.key(0)), rows, shape((2,), jnp.float32))
        given = params, batch, rows, draws, ranking, one, one
        found = loop._generate.lower(how, room, copy, *given).compile().memory_analysis()
    held = found.argument_size_in_bytes + found.temp_size_in_bytes
    return f"{held / 1e9:6.1f} GB: {length} tokens, room for {room}; {fits(held)}"


def fits(held: int) -> str:
    """Tell whether so many bytes fit; raise MMJaxError if not."""
    room = h200_target.MEMORY_GB * USABLE
    if held > room * 1e9:
        raise MMJaxError(f"{held / 1e9:.1f} GB do not fit into {room:.1f}")
    return f"fits {room:.1f}"


def with_flags(name: str) -> str:
    """Compile a case in a process that has XLA's flags for several GPUs: it reads them once."""
    flags = " ".join(f"{flag}={value}" for flag, value in SEVERAL_GPUS.items())
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"}
    command = [sys.executable, "-m", "tests.real.h200", "--here", name]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    told = done.stdout.strip()
    if done.returncode:
        raise MMJaxError(told or f"its process ended with {done.returncode}")
    return told


def cases(folder: Path, here: bool = False) -> dict[str, Callable[[], str]]:
    """Return what is compiled, by name; here: by this process, also what is for several GPUs."""
    found = {
        f"attention {name} head dim {h}": partial(attention, name, h, folder)
        for name, dims in HEAD_DIMS.items()
        for h in dims
    }
    for recipe, count, overrides in STEPS:
        name = " ".join((f"step {recipe} on {count}", *overrides))
        mine = here or count == 1
        found[name] = partial(step, recipe, count, overrides) if mine else partial(with_flags, name)
    for count, copy in ((1, None), (1, copies.APART), (8, None), (8, copies.APART)):
        name = f"generation fuyu_8b on {count}, weights {copy or 'where they lie'}"
        mine = here or count == 1
        found[name] = partial(generation, count, copy) if mine else partial(with_flags, name)
    return found


def compile_here(folder: Path, name: str) -> int:
    """Print what ``with_flags`` asks of its process, or the error; return the exit code."""
    try:
        print(cases(folder, here=True)[name]())
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="compile the cases whose names contain this")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/h200-ptxas"),
        help="ptxas's words; logs beside it",
    )
    parser.add_argument("--here", metavar="NAME", help="compile this case, with the flags given")
    args = parser.parse_args()
    if args.here:
        return compile_here(args.folder, args.here)
    wrong = 0
    for name, compile_ in cases(args.folder).items():
        if args.only not in name:
            continue
        start = time.perf_counter()
        args.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with h200_target.log_to(args.folder.with_suffix(".log")):
                told = compile_()
        except Exception as error:  # whatever a compiler raises is the answer
            told = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            wrong += 1
        print(f"{name:<62} {time.perf_counter() - start:4.0f} s  {told}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
