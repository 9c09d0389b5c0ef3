"""A memory plan as it is printed: its table, and whether it fits."""

from __future__ import annotations

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from mmjax.runtime import USABLE
from mmjax.train.plan import MOMENTS, PARTS, MemoryPlan, make_plan
from mmjax.train.settings import RunSettings
from mmjax.types import MMJaxError


def table(plan: MemoryPlan) -> Table:
    """Lay a plan out by moment, in GB of 10**9 bytes on each device; a small one in MB."""
    scale, unit = (1e9, "GB") if max(plan.sums) >= 1e9 else (1e6, "MB")
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column(f"{plan.name}, {unit} on each device")
    for moment in MOMENTS:
        shown.add_column(moment, justify="right")
    shown.add_column()
    notes = dict(plan.kinds) | {
        "kept": f"remat {plan.remat}: {plan.most('kept') / plan.tokens / 1e6:.2f} MB a token",
        **dict.fromkeys(("layer", "head", "multiplied", "gathered", "turned"), "estimate"),
    }
    for part, words in PARTS.items():
        if plan.most(part):
            there = (f"{size / scale:.2f}" if size else "" for size in plan.parts[part])
            shown.add_row(words, *there, notes.get(part, ""))
    shown.add_section()
    shown.add_row("sum", *(f"{size / scale:.2f}" for size in plan.sums), "")
    if plan.compiled is not None:
        shown.add_section()
        shown.add_row("the compiled step, as XLA counts", f"{plan.compiled / scale:.2f}")
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
        "remat": ("model.remat=full", plan.most("kept") if plan.remat != "full" else 0),
        "rows": ("a smaller data.batch_size or data.seq_len", plan.most("kept")),
        "optimizer": ("optim.name=adafactor", plan.most("optimizer")),
        "devices": ("more devices on fsdp", plan.most("trained") + plan.most("optimizer")),
    }
    best = sorted(help_.values(), key=lambda x: -x[1])[:3]
    ways = ", ".join(words for words, size in best if size > 0.1e9) or "larger devices"
    return (
        f"does not fit: {need:.1f} GB, and {room:.1f} are there ({USABLE:.0%} of {memory:g} GB); "
        f"what would help most: {ways}"
    )


def saving(plan: MemoryPlan) -> str:
    """Say what checkpoints need on disk and, over all hosts, in memory.

    Nothing is deleted before another is whole.
    """
    return (
        f"to save: {_size(plan.saved)} a checkpoint, {_size((plan.stay + 1) * plan.saved)} for the "
        f"{plan.stay} that stay and the one being written, which the hosts' memory holds too"
    )


def answering(plan: MemoryPlan) -> str:
    """Say what the model needs to answer, over all devices that it is spread over."""
    need = plan.answers
    return (
        f"to answer: {_size(need.weights)} of weights in bfloat16, {_size(need.quantised)} in "
        f"int8, and {_size(need.row)} of keys and values a row of {need.tokens:,} tokens"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def print_plan(settings: RunSettings, *, devices: int = 0, memory: float = 0.0) -> None:
    """Print the plan of a run, and whether it fits.

    devices: simulated ones, so many; 0 plans and compiles for those of this machine. memory: GB
    of each; 0 asks the devices, which a CPU does not answer.
    """
    if devices < 0 or not memory >= 0:  # which nan is not
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
    console.print(saving(plan), soft_wrap=True)
    console.print(answering(plan), soft_wrap=True)
