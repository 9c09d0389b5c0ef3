"""Run cases: two processes taking turns, parity first, then the clock."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import environment
from bench.cases import Case
from mmjax.types import MMJaxError


class BenchError(MMJaxError):
    """A side of a benchmark failed; the message holds its error."""


class Side:
    """A worker process; ``call`` sends one request and waits for the answer."""

    def __init__(self, name: str, *, python: str = sys.executable, cores: int = 0):
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", "bench.worker", name, str(cores)],
            cwd=environment.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait(timeout=60)  # negative: the signal that ended it
            raise BenchError(
                f"the {self.name} side ended with code {code} before it answered {do!r}; its own "
                "message stands above"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name} side, {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def run_cases(
    cases: list[Case],
    *,
    peer: str | None,
    quick: bool = False,
    torchvision_python: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure cases one by one and yield their rows.

    peer: ``torch`` or None. torchvision_python: an interpreter of another environment that also
    has torchvision; without one the peers that need it are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        for (suite, cores), group in _groups(cases, quick).items():
            sides = {"ours": Side("ours", cores=cores)}
            if peer:
                sides["peer"] = Side("peer", cores=cores)
            if peer and torchvision_python and suite in ("input", "all"):
                sides["torchvision"] = Side("peer", python=torchvision_python, cores=cores)
            try:
                versions = {n: s.call("versions") for n, s in sides.items()}
                where = environment.describe(versions)
                for case in group:
                    yield from _run_case(case, sides, Path(folder), quick, where)
            finally:
                for side in sides.values():
                    side.close()


def _groups(cases: list[Case], quick: bool) -> dict[tuple[str, int], list[Case]]:
    """Group cases by what shares processes: a suite and its cores, or everything when quick."""
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault(("all" if quick else case.suite, case.threads), []).append(case)
    return groups


def _run_case(case: Case, sides: dict[str, Side], folder: Path, quick: bool, where: dict):
    """Yield one row for each pair of (our variant, peer's variant)."""
    model = folder / f"model-{case.size.d}-{case.size.layers}"
    if case.suite != "input" and not model.exists():
        writer = sides.get("peer", sides["ours"])
        writer.call("write_model", size=case.to_json()["size"], folder=str(model))
    for i, impl in enumerate(case.impls):
        for j, peer_impl in enumerate(case.peers):
            if i and j:
                continue  # our other variants are compared with the peer's first one alone
            side = sides.get("torchvision" if peer_impl == "torchvision" else "peer")
            if side is None and j:
                continue
            pair = (sides["ours"], impl), (side, peer_impl)
            yield _row(case, pair, model, folder, quick, where)


def _row(case: Case, pair, model: Path, folder: Path, quick: bool, where: dict) -> dict[str, Any]:
    (ours, impl), (peer, peer_impl) = pair
    outputs = {}
    prepared = {}
    for side, variant in pair:
        if side is None:
            continue
        file = folder / f"{'ours' if side is ours else 'peer'}.npz"
        prepared[side] = side.call(
            "prepare", case=case.to_json(), folder=str(model), impl=variant, outputs=str(file),
            warmup=1 if quick else 3, tune=not quick,
        )  # fmt: skip
        with np.load(file) as arrays:
            outputs[side] = dict(arrays)
    errors = parity(case.suite, outputs[ours], outputs[peer]) if peer else None
    row = {
        "suite": case.suite,
        "case": case.name,
        "ours_impl": impl,
        "peer_impl": peer_impl if peer else None,
        "unit": case.unit,
        "target": case.target,
        "parity_err": None if errors is None else max(errors.values()),
        "parity_errors": errors,
        "parity_bound": case.bound,
        "parity_ok": None if errors is None else max(errors.values()) <= case.bound + 1e-9,
        "compile_s": round(prepared[ours]["compile_s"], 2),
        "peer_note": prepared[peer]["note"] if peer else "",
    }
    row |= _timings(case, ours, peer, quick)
    return row | {"quick": quick, "size": case.to_json()["size"], "env": where}


def parity(suite: str, ours: dict[str, np.ndarray], peer: dict[str, np.ndarray]):
    """Compare both sides' outputs; returns {what: error}, infinite where shapes differ.

    train: largest relative difference of losses and gradient norms over four optimizer steps.
    decode: share of new tokens that differ. input: share of tokens that differ, and the largest
    difference of patches in grey levels.
    """
    errors = {}
    for name, a in ours.items():
        b = peer[name]
        if a.shape != b.shape:
            errors[name] = float("inf")
        elif name == "tokens":
            errors[name] = float(np.mean(a != b))
        elif name == "levels":
            # Both are grey levels, one of them through float32 and back.
            errors[name] = round(float(np.abs(a - b).max()), 3)
        else:
            errors[name] = float(np.max(np.abs(a - b) / np.abs(b)))
    return errors


def _timings(case: Case, ours: Side, peer: Side | None, quick: bool) -> dict[str, Any]:
    """Measure in turns and summarise.

    The noise floor is the spread of one side's own medians from turn to turn, the larger of both
    sides: (largest - smallest) / median. A ratio that close to 1 says nothing.
    """
    plan = (
        {"seconds": 0, "least": 1, "most": 2} if quick else {"seconds": 4, "least": 3, "most": 60}
    )
    busy = 0.0 if quick else environment.busy_cores()
    order = (ours, peer, ours, peer, ours) if peer else (ours, ours, ours)
    if quick:
        order = order[:3]
    turns: dict[Side, list[list[float]]] = {}
    cpu: dict[Side, list[float]] = {}
    for side in order:
        answer = side.call("measure", **plan)
        turns.setdefault(side, []).append(answer["seconds"])
        cpu.setdefault(side, []).append(answer["cpu"])
        if not quick:
            busy = max(busy, environment.busy_cores(0.3))
    found = {}
    medians = {}
    for name, side in (("ours", ours), ("peer", peer)):
        if side is None:
            continue
        flat = sorted(x for turn in turns[side] for x in turn)
        medians[name] = statistics.median(flat)
        found[f"{name}_ms"] = round(medians[name] * 1e3, 3)
        found[f"{name}_ms_p10"] = round(flat[len(flat) // 10] * 1e3, 3)
        found[f"{name}_ms_p90"] = round(flat[(len(flat) * 9) // 10] * 1e3, 3)
        found[f"{name}_per_s"] = round(case.work / medians[name], 2)
        found[f"{name}_turns_ms"] = [round(statistics.median(t) * 1e3, 3) for t in turns[side]]
        found[f"{name}_repeats"] = len(flat)
        found[f"{name}_cpu_ms"] = round(statistics.median(cpu[side]) * 1e3, 3)
    spreads = []
    for side_turns in turns.values():
        each = [statistics.median(t) for t in side_turns]
        if len(each) > 1:
            spreads.append((max(each) - min(each)) / statistics.median(each))
    ratio = round(medians["peer"] / medians["ours"], 3) if peer else None
    return found | {
        "ratio": ratio,
        "noise": round(max(spreads), 3),
        "busy_cores": busy,
        "loaded": busy > environment.QUIET,
    }
