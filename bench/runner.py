"""Run cases: two processes taking turns, parity first, then the clock."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench import environment, probe, suites
from bench.cases import Case
from bench.sides import BenchError, Side, Sides


def run_cases(
    cases: list[Case],
    *,
    peer: str | None,
    quick: bool = False,
    torchvision_python: str | None = None,
    flamingo_python: str | None = None,
    deadline: float = suites.DEADLINE,
) -> Iterator[dict[str, Any]]:
    """Measure cases one by one and yield their rows.

    peer: ``torch`` or None. torchvision_python: an interpreter of another environment that also
    has torchvision, flamingo_python: of one that has OpenFlamingo; without one the peers that need
    it are left out. deadline: seconds a suite has from its first case on. What is not measured by
    then, and what fails, becomes a row with its ``error``, and the run goes on.
    """
    ends: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for (suite, cores, device), group in _groups(cases, quick).items():
            makers = {"ours": {"name": "ours"}}
            if peer and any(one is not None for case in group for one in case.peers):
                makers["peer"] = {"name": "peer"}
                if torchvision_python and suite in ("input", "all"):
                    makers["torchvision"] = {"name": "peer", "python": torchvision_python}
                if flamingo_python:
                    makers["flamingo"] = {"name": "peer", "python": flamingo_python}
            sides = Sides(
                {key: {**maker, "cores": cores, "device": device} for key, maker in makers.items()}
            )
            try:
                for case in group:
                    limit = min(deadline, probe.DEADLINE) if case.suite == "probe" else deadline
                    until = ends.setdefault(case.suite, time.monotonic() + limit)
                    yield from _run_case(case, sides, Path(folder), quick, until)
            finally:
                sides.close()


def _groups(cases: list[Case], quick: bool) -> dict[tuple[str, int, str], list[Case]]:
    """Group cases by what shares processes: suite, cores and device; when quick, all suites do."""
    groups: dict[tuple[str, int, str], list[Case]] = {}
    for case in cases:
        key = ("all" if quick else case.suite, case.threads, case.device)
        groups.setdefault(key, []).append(case)
    return groups


def _run_case(case: Case, sides: Sides, folder: Path, quick: bool, until: float):
    """Yield one row for each pair of (our variant, peer's variant)."""
    for impl, peer_impl, peer in _pairs(case, sides):
        row = {
            "suite": case.suite,
            "case": case.name,
            "options": case.options,
            "ours_impl": impl,
            "peer_impl": peer_impl,
            "device": case.device,
            "unit": case.unit,
            "target": case.target,
            "rate_target": case.rate_target,
            "alone": None in case.peers,
            **_verdict(case, None),
        }
        try:
            if case.peers:
                row |= _measured(case, impl, peer_impl, sides, peer, folder, quick, until)
            else:
                found = sides.get("ours", until).call("survey", case=case.to_json())
                row |= _verdict(case, found.pop("errors", None)) | found
        except BenchError as error:
            row["error"] = str(error)
        yield row | {"quick": quick, "size": case.to_json()["size"], "env": sides.where()}


def _pairs(case: Case, sides: Sides) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield (our variant, peer's variant, key of the peer's side); None where there is no peer."""
    for i, impl in enumerate(case.impls):
        for j, peer_impl in enumerate(case.peers or ("",)):
            if i and j:
                continue  # our other variants are compared with the peer's first one alone
            if peer_impl is None:  # measured alone
                yield impl, None, None
                continue
            key = "torchvision" if peer_impl == "torchvision" else "peer"
            key = "flamingo" if case.suite == "flamingo" else key
            if key in sides and case.peers:
                yield impl, peer_impl, key
            elif not j:
                yield impl, None, None


def _measured(
    case: Case, impl: str, peer_impl: str | None, sides: Sides, peer_key: str | None,
    folder: Path, quick: bool, until: float,
) -> dict[str, Any]:  # fmt: skip
    """Prepare both sides, compare what they return, then measure them in turns."""
    ours = sides.get("ours", until)
    peer = sides.get(peer_key, until) if peer_key else None
    model = folder / f"{type(case.size).__name__}-{case.size.d}-{case.size.layers}"
    if case.suite in suites.WITH_MODEL and not model.exists():
        (peer or ours).call("write_model", case=case.to_json(), folder=str(model))
    outputs = {}
    prepared = {}
    for side, variant in ((ours, impl), (peer, peer_impl)):
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
    return {
        **_verdict(case, errors),
        "compile_s": round(prepared[ours]["compile_s"], 2),
        "peer_note": prepared[peer]["note"] if peer else "",
        **prepared[ours]["details"],
        **_timings(case, ours, peer, quick),
    }


def _verdict(case: Case, errors: Mapping[str, float] | None) -> dict[str, Any]:
    """Return the fields on parity; without a comparison they are None."""
    # numpy's max hands a NaN on; Python's drops it.
    worst = None if errors is None else float(np.max(list(errors.values())))
    return {
        "parity_err": worst,
        "parity_errors": errors,
        "parity_bound": case.bound,
        "parity_ok": None if worst is None else worst <= case.bound + 1e-9,
    }


def parity(suite: str, ours: dict[str, np.ndarray], peer: dict[str, np.ndarray]):
    """Compare both sides' outputs; returns {what: error}, infinite where shapes differ.

    train, and the train steps of flamingo and bunny: largest relative difference of losses and
    gradient norms over four optimizer steps. decode, and their generation: share of new tokens that
    differ. input: share of tokens that differ, and the largest difference of patches in grey
    levels. attention, loss: largest difference over largest value, of each output.
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
        elif suite in ("attention", "loss"):
            errors[name] = float(np.abs(a - b).max() / np.abs(b).max())
        else:
            errors[name] = float(np.max(np.abs(a - b) / np.abs(b)))
    return errors


def _timings(case: Case, ours: Side, peer: Side | None, quick: bool) -> dict[str, Any]:
    """Measure in turns and summarise.

    The noise floor is the spread of one side's own medians from turn to turn, the larger of both
    sides: (largest - smallest) / median. A ratio that close to 1 says nothing.
    """
    # A GPU has one user at a time, and is lent for minutes.
    seconds = 4 if case.device == "cpu" else 1
    plan = {"seconds": seconds, "least": 3, "most": 60}
    if quick:
        plan = {"seconds": 0, "least": 1, "most": 2}
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
