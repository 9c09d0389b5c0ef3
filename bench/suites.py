"""The suites by name: their cases, and the class of each side that runs one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from bench import bunny, cases, flamingo, fuyu8b, kernels, length, probe, shard
from bench.cases import Case

SUITES = {
    "probe": (probe.probe_cases, "bench.probe:Probe", None),
    "attention": (
        kernels.attention_cases, "bench.kernels_ours:Attention", "bench.kernels_torch:Attention",
    ),
    "loss": (kernels.loss_cases, "bench.kernels_ours:Loss", "bench.kernels_torch:Loss"),
    "train": (cases.train_cases, "bench.ours:Train", "bench.torch_peer:Train"),
    "decode": (cases.decode_cases, "bench.ours:Decode", "bench.torch_peer:Decode"),
    "flamingo": (
        flamingo.flamingo_cases, "bench.flamingo_ours:make", "bench.flamingo_torch:make",
    ),
    "bunny": (bunny.bunny_cases, "bench.bunny_ours:make", "bench.bunny_torch:make"),
    "train_8b": (
        fuyu8b.train_cases, "bench.fuyu8b_ours:make_train", "bench.fuyu8b_torch:make_train",
    ),
    "decode_8b": (fuyu8b.decode_cases, "bench.fuyu8b_ours:Decode", "bench.fuyu8b_torch:Decode"),
    "length": (length.length_cases, "bench.length:Length", None),
    "input": (cases.input_cases, "bench.ours:Input", "bench.torch_peer:Input"),
    "shard": (shard.shard_cases, "bench.shard:Shard", None),
}  # fmt: skip
WITH_MODEL = ("train", "decode", "flamingo", "bunny", "train_8b", "decode_8b")
"""Those whose sides read a model that one of them writes."""
DEFAULT = ("train", "decode", "input")
DEADLINE = 600
"""Seconds for the cases of one suite."""


def cases_of(suite: str, quick: bool = False, device: str = "cpu") -> list[Case]:
    """Return the cases of a suite; quick ones show that the code runs, not how fast.

    device: what the machine has, cpu or gpu; suites that know no GPU stay on the CPU.
    """
    return SUITES[suite][0](quick, device)


def module_of(suite: str, side: str) -> ModuleType:
    """Return the module that runs a suite's cases on a side, ours or peer."""
    return importlib.import_module(SUITES[suite][1 if side == "ours" else 2].partition(":")[0])


def side_of(suite: str, side: str) -> Callable:
    """Return what makes a case of a suite on a side: its class, or a function that chooses one."""
    name = SUITES[suite][1 if side == "ours" else 2].partition(":")[2]
    return getattr(module_of(suite, side), name)
