"""A run goes on after a deadline and after an error; what their rows and the document say."""

import dataclasses
import json
import time

import pytest

from bench import __main__ as cli
from bench import environment, kernels, probe, report, runner, shard, sides


@pytest.fixture(scope="module")
def rows():
    """A probe without time, an implementation that does not exist, and what comes after them."""
    packed, loss = kernels.attention_cases(True, "cpu")[2], kernels.loss_cases(True, "cpu")[0]
    packed = dataclasses.replace(packed, impls=("xla", "nonsense"))
    cases = [probe.probe_cases(True, "cpu")[0], packed, loss]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "DEADLINE", 0)
        return list(runner.run_cases(cases, peer=None, quick=True))


@pytest.mark.heavy
def test_the_run_goes_on_after_a_deadline_and_an_error(rows):
    assert [r["suite"] for r in rows] == ["probe", "attention", "attention", "loss"]
    late, packed, wrong, loss = rows
    assert late["error"] == "deadline" and late["parity_ok"] is None
    assert "'nonsense' is unknown" in wrong["error"] and "ours_ms" not in wrong
    for row in (packed, loss):
        assert "error" not in row and row["ours_ms"] > 0 and row["temp_size_in_bytes"] > 0
    assert packed["ours_per_s"] == pytest.approx(
        kernels.attention_flops(packed["options"]) / 1e6 / packed["ours_ms"], rel=0.05, abs=0.006
    )
    assert all({"cpu", "commit", "versions"} <= r["env"].keys() for r in rows)
    assert "jax" in loss["env"]["versions"]["ours"]


def test_the_document_names_what_was_not_measured(rows):
    text = report.markdown(rows, "python -m bench", "rows.jsonl")
    assert "- probe: cpu: not measured, deadline" in text
    assert "nonsense: not measured, ours side, prepare: ValueError" in text
    assert "## Loss head" in text and "- the shard suite" in text
    assert "error: deadline" in report.table(rows[:1])[1]


def test_a_side_past_its_deadline_is_ended_and_started_again():
    group = sides.Sides({"ours": {"name": "ours", "cores": 0, "device": "cpu"}})
    with pytest.raises(sides.DeadlineError, match="deadline"):
        group.get("ours", time.monotonic() + 0.01)  # Python alone takes longer to start
    first = group._running["ours"]
    assert first.process.returncode < 0
    second = group.get("ours", time.monotonic() + 100)
    assert second is not first and "jax" in group.where()["versions"]["ours"]
    group.close()
    assert second.process.returncode == 0


def test_an_error_or_a_deadline_fails_the_command(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ["--suite", "shard", "--quick", "--device", "cpu", "--peer", "none"]
    assert cli.main([*arguments, "--deadline", "0", "--out", str(out)]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["case"] for r in rows] == [c.name for c in shard.shard_cases(True, "cpu")]
    assert {r["error"] for r in rows} == {"deadline"}


def test_a_gpu_that_is_not_there_is_an_error_and_never_the_cpu():
    (row,) = runner.run_cases(probe.probe_cases(True, "gpu")[:1], peer=None, quick=True)
    assert ("error" in row) == (not environment.gpu())
    assert "finds no CUDA GPU" in row.get("error", "finds no CUDA GPU")
    assert row.get("device_kind") != "cpu"


def attention_row(case, **changes):
    return {
        "suite": "attention", "case": case.name, "options": case.options, "ours_impl": "triton",
        "peer_impl": "flash", "unit": case.unit, "target": case.target, "parity_ok": True,
        "rate_target": case.rate_target, "parity_err": 0.0, "parity_bound": case.bound,
        "device": "gpu", "ours_ms": 1.0, "peer_ms": 2.0, "ours_per_s": 300.0, "peer_per_s": 150.0,
        "ratio": 2.0, "noise": 0.0, "loaded": False, "quick": False, "compile_s": 1.0,
        "temp_size_in_bytes": 2_000_000, "env": {
            "cpu": "c", "cores": 1, "memory_gb": 1, "system": "s", "python": "3", "commit": "c",
            "accelerator": "NVIDIA H200, driver 1", "date": "d", "load_at_start": 0, "versions": {},
        },
    } | changes  # fmt: skip


def test_the_document_of_a_gpu_gives_rates_memory_and_what_packing_gains():
    cases = [c for c in kernels.attention_cases(False, "gpu") if not c.options["backward"]]
    slow = next(c for c in cases if c.rate_target == 250)
    dense = next(c for c in cases if c.options["t"] == 16384 and not c.options["documents"])
    packed = next(c for c in cases if c.options["documents"])
    text = report.markdown(
        [
            attention_row(slow, ours_per_s=240.0),
            attention_row(dense, ours_ms=8.0),
            attention_row(packed, ours_ms=4.0),
        ],
        "c",
        "r",
    )
    assert f"- attention: {slow.name}, triton vs flash: 240 of 250 TFLOP per second" in text
    assert f"{packed.name}, triton: 2.00x" in text and f"{dense.name}, triton: 2.0 MB" in text
    assert "Units are TFLOP" in text and "- NVIDIA H200, driver 1" in text
    assert "anything on a GPU" not in text
