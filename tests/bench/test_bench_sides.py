"""What fails or hangs on one side costs no more than it has to."""

import dataclasses
import time

import pytest

from bench import fuyu8b, kernels, probe, report, runner, sides, suites, worker
from bench.cases import Case

_, _, PACKED, _ = kernels.attention_cases(True, "cpu")
LOSS = kernels.loss_cases(True, "cpu")[1]


@pytest.fixture
def asked(monkeypatch):
    """What the sides are asked to prepare or write, in order."""
    found, call = [], sides.Side.call

    def recorded(side, do, **arguments):
        if do in ("prepare", "write_model"):
            found.append((side.name, arguments.get("impl")))
        return call(side, do, **arguments)

    monkeypatch.setattr(sides.Side, "call", recorded)
    return found


@pytest.mark.heavy
def test_a_peer_that_fails_leaves_ours_measured_and_each_side_builds_a_case_once(asked):
    # cuDNN is no choice of torch's on a CPU.
    case = dataclasses.replace(PACKED, peers=(PACKED.peers[1], "cudnn"))
    fine, alone = runner.run_cases([case], peer="torch", quick=True)
    assert fine["parity_ok"] and fine["ratio"] > 0 and "peer_error" not in fine
    assert alone["ours_ms"] > 0 and alone["ratio"] is None and alone["parity_ok"] is None
    assert "peer side, prepare: RuntimeError" in alone["peer_error"] and "error" not in alone
    assert asked == [("ours", "xla"), ("peer", PACKED.peers[1]), ("peer", "cudnn")]
    text = report.markdown([fine, alone], "c", "r")
    assert "vs cudnn: does not count, peer side, prepare: RuntimeError" in text
    assert report.table([alone])[1][-1] == "the peer failed"


@pytest.mark.heavy
def test_what_takes_too_long_costs_its_own_row():
    slow = dataclasses.replace(PACKED, seconds=0.01)
    late, fine = runner.run_cases([slow, LOSS], peer=None, quick=True)
    assert late["error"] == "ours side, versions: not done within 0.01 s"  # Python alone is slower
    assert fine["ours_ms"] > 0


def test_all_cases_on_a_gpu_have_a_limit_and_those_with_a_target_come_early():
    for suite in ("probe", "attention", "loss", "train_8b", "decode_8b"):
        for case in suites.cases_of(suite, False, "gpu"):
            assert 0 < case.seconds <= 300 < suites.DEADLINE
    cases = kernels.attention_cases(False, "gpu")
    assert [bool(case.rate_target) for case in cases] == [True] * 4 + [False] * (len(cases) - 4)
    assert cases[6].options["documents"] and cases[4].options["t"] == cases[6].options["t"]


def test_ours_go_beside_the_first_peer_before_the_others_come():
    group = sides.Sides({"ours": {}, "peer": {}})
    case = Case("attention", "", {}, 1, "", 0, impls=("a", "b"), peers=("x", "y"))
    found = [(impl, peer) for impl, peer, _ in runner._pairs(case, group)]
    assert found == [("a", "x"), ("b", "x"), ("a", "y")]
    alone = sides.Sides({"ours": {}})
    assert list(runner._pairs(case, alone)) == [("a", None, None), ("b", None, None)]


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter whose worker answers the first request with a broken device."""
    file = tmp_path / "python"
    file.write_text('#!/bin/sh\nread line; echo \'{"error": "gone", "broken": true}\'; read line\n')
    file.chmod(0o755)
    return str(file)


def test_a_side_whose_device_is_broken_is_started_again(stand_in):
    group = sides.Sides({"ours": {"name": "ours", "python": stand_in}})
    for _ in range(2):
        with pytest.raises(sides.BenchError, match="ours side, versions: gone"):
            group.get("ours", time.monotonic() + 60)
        side = group._running["ours"]
        assert side.ended and side.process.returncode < 0
    group.close()


def test_a_fault_on_a_gpu_breaks_the_process_and_a_call_that_cannot_be_done_does_not():
    assert worker.failure(RuntimeError("illegal address"), True) == {
        "error": "RuntimeError: illegal address", "broken": True,
    }  # fmt: skip
    assert not worker.failure(RuntimeError("no"), False)["broken"]
    assert not worker.failure(ValueError("head dim 72"), True)["broken"]


def test_half_a_model_is_taken_away(tmp_path):
    class Fails:
        def call(self, do, case, folder):
            (tmp_path / "model" / "lora").mkdir(parents=True)
            raise sides.BenchError("no room")

    with pytest.raises(sides.BenchError, match="no room"):
        runner._write_model(Fails(), fuyu8b.decode_cases(True, "cpu")[0], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_probe_asks_each_implementation_for_itself():
    from mmjax.ops.attention import IMPLEMENTATIONS

    assert sorted(probe.IMPLEMENTATIONS) == sorted(IMPLEMENTATIONS)
    first, *cases = probe.probe_cases(False, "gpu")
    assert "attention" not in first.options
    assert [case.options["attention"] for case in cases] == [*probe.IMPLEMENTATIONS]
    rows = [
        {"case": "gpu", "devices": 1, "device_kind": "H", "versions": {"jax": "1"},
         "matmul_dtype": "bfloat16", "matmul_gflop_s": 2.0, "copy_gb_s": 3.0},
        {"case": "gpu, attention mosaic", "error": "ours side, survey: not done within 75 s"},
        {"case": "gpu, attention xla", "attention": {"xla": {"bfloat16": 0.25}}},
    ]  # fmt: skip
    assert report.report_surveys.probe_table(rows) == [
        "- gpu: 1 x H; jax 1",
        "- matmul, bfloat16: 2 GFLOP/s; copy: 3 GB/s",
        "- gpu, attention mosaic: ours side, survey: not done within 75 s",
        "- attention: `xla` in bfloat16 error 2.5e-01",
    ]
