"""Run cases: two processes taking turns, parity first, then the clock."""

from __future__ import annotations

import shutil
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
                ours = sides.get("ours", until, case.seconds)
                found = ours.call("survey", case=case.to_json())
                row |= _verdict(case, found.pop("errors", None)) | found
        except BenchError as error:
            row["error"] = str(error)
        yield row | {"quick": quick, "size": case.to_json()["size"], "env": sides.where()}


def _pairs(case: Case, sides: Sides) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield (our variant, peer's variant, key of the peer's side); None where there is no peer.

    All of ours beside the peer's first variant, then ours by default beside its others: each side
    then builds little anew, and where time runs out the first rows say most.
    """
    first, *others = case.peers or ("",)
    pairs = [(impl, first, True) for impl in case.impls]
    for impl, peer_impl, needed in pairs + [(case.impls[0], other, False) for other in others]:
        if peer_impl is None:  # measured alone
            yield impl, None, None
            continue
        key = "torchvision" if peer_impl == "torchvision" else "peer"
        key = "flamingo" if case.suite == "flamingo" else key
        if key in sides and case.peers:
            yield impl, peer_impl, key
        elif needed:
            yield impl, None, None


def _measured(
    case: Case, impl: str, peer_impl: str | None, sides: Sides, peer_key: str | None,
    folder: Path, quick: bool, until: float,
) -> dict[str, Any]:  # fmt: skip
    """Prepare both sides, compare what they return, then measure them in turns.

    What fails on the peer's side becomes ``peer_error``, and ours is measured alone.
    """
    name = f"{type(case.size).__name__}-{case.size.d}-{case.size.layers}"
    shared, own = folder / name, folder / f"{name}-own"
    needs_model = case.suite in suites.WITH_MODEL

    def prepared(key: str, variant: str | None, model: Path) -> tuple[Side, dict, dict]:
        side, file = sides.get(key, until, case.seconds), folder / f"{key}.npz"
        if needs_model and not model.exists():
            _write_model(side, case, model)
        answer = side.prepare(
            case=case.to_json(), folder=str(model), impl=variant, outputs=str(file),
            warmup=1 if quick else 3, tune=not quick,
        )  # fmt: skip
        with np.load(file) as arrays:
            return side, answer, dict(arrays)

    failed, peer, errors = {}, None, None
    if peer_key and needs_model and not shared.exists():
        try:
            _write_model(sides.get(peer_key, until, case.seconds), case, shared)
        except BenchError as error:
            peer_key, failed = None, {"peer_error": str(error)}
    ours, mine, outputs = prepared("ours", impl, shared if shared.exists() else own)
    if peer_key:
        try:
            peer, theirs, their_outputs = prepared(peer_key, peer_impl, shared)
            errors = parity(case.suite, outputs, their_outputs)
        except BenchError as error:
            failed = {"peer_error": str(error)}
    try:
        times = _timings(case, ours, peer, quick)
    except BenchError as error:
        if peer is None or ours.ended:
            raise
        peer, errors, failed = None, None, {"peer_error": str(error)}
        times = _timings(case, ours, None, quick)
    return {
        **_verdict(case, errors),
        **failed,
        "compile_s": round(mine["compile_s"], 2),
        "peer_note": theirs["note"] if peer else "",
        **mine["details"],
        **times,
    }


def _write_model(side: Side, case: Case, folder: Path) -> None:
    """Let a side write the random model of a case; half of one is taken away again."""
    try:
        side.call("write_model", case=case.to_json(), folder=str(folder))
    except BenchError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
    # A GPU has one user at a time, is lent for minutes and gives steady times.
    on_cpu = case.device == "cpu"
    plan = {"seconds": 4 if on_cpu else 0.5, "least": 3 if on_cpu else 4, "most": 60}
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
        if on_cpu and not quick:
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
