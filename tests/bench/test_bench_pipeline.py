"""The pipeline beside the peer's: what a run measures, what it compares, what it reports."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bench import pipeline, processes, records, report
from bench.pipeline_sides import drain


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """The row of a quick run with one worker on each side."""
    folder = tmp_path_factory.mktemp("pipeline")
    out = folder / "rows.jsonl"
    argv = ["--quick", "--workers", "1", "--dir", str(folder), "--out", str(out)]
    assert pipeline.main(argv) == 0
    return json.loads(out.read_text())


@pytest.mark.heavy
def test_a_quick_run_draws_every_record_and_both_sides_make_the_same(row):
    ours, peer = row["ours"], row["peer"]
    assert ours["records"] == ours["images"] == row["records"] == 96 and ours["skipped"] == 0
    assert peer["images"] == 12 and row["ours_tenth"]["images"] >= 10
    assert row["parity_errors"] == {"tokens": 0, "levels": 0} and row["parity_ok"]
    tokens = ours["batches"] * 2 * 128
    assert ours["padding"] == pytest.approx(1 - ours["tokens"] / tokens, abs=1e-4)
    assert 0 < ours["padding"] < 0.4
    assert row["ratio_core"] == pytest.approx(
        ours["images_per_core_s"] / peer["images_per_core_s"], abs=0.01
    )
    # a worker of its own on either side, and its memory and time in the figures
    assert ours["early_mb"] > 100 and peer["early_mb"] > 100 and ours["cpu_s"] > 0
    assert ours["growth_mb"] == pytest.approx(ours["late_mb"] - ours["early_mb"], abs=0.11)
    assert [m["share"] for m in ours["memory"]] == sorted(m["share"] for m in ours["memory"])


@pytest.mark.heavy
def test_the_document_has_the_run_and_names_a_miss(row):
    text = report.markdown([row], "c", "r")
    assert "## Pipeline" in text and "96 records, 12 pictures" in text and "--quick" in text
    fast = row | {"ratio": 6.0, "ratio_core": 5.5}
    assert "Every row reaches its target" in report.markdown([fast], "c", "r")
    slow = row | {"ratio": 6.0, "ratio_core": 4.5}
    assert "- pipeline: 4.50x of 5x" in report.markdown([slow], "c", "r")
    wrong = fast | {"parity_ok": False}
    assert "- pipeline: does not count" in report.markdown([wrong], "c", "r")


def test_records_are_seeded_and_of_mixed_sizes(tmp_path):
    sizes = records.Sizes(sides=(40, 90), question=(2, 5), answer=(2, 8))
    facts = records.write(tmp_path / "a", 20, 6, sizes)
    assert records.write(tmp_path / "b", 20, 6, sizes) == facts
    assert (tmp_path / "a/records.json").read_text() == (tmp_path / "b/records.json").read_text()
    shapes = set()
    for number in range(6):
        a, b = (Image.open(tmp_path / side / f"pictures/{number}.jpg") for side in "ab")
        np.testing.assert_array_equal(a, b)
        assert 40 <= max(a.size) <= 90 and min(a.size) >= max(a.size) // 2
        shapes.add(a.size)
    assert len(shapes) == 6
    one = json.loads((tmp_path / "a/records.json").read_text())[0]
    assert one["conversations"][0]["value"].startswith("<image>\n")
    assert len(set(records.WORDS)) == len(records.WORDS) == 1680


def test_a_difference_is_found(tmp_path):
    arrays = {"7.tokens": np.arange(4), "7.levels": np.zeros((2, 3), np.uint8)}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **arrays | {"7.levels": np.full((2, 3), 0.5, np.float32)})
    np.savez(tmp_path / "c.npz", **{f"8{k[1:]}": v for k, v in arrays.items()})
    a, b, c = (tmp_path / f"{name}.npz" for name in "abc")
    assert pipeline.compare(a, a) == {"tokens": 0, "levels": 0}
    assert pipeline.compare(a, b) == {"tokens": 0, "levels": 0.5}
    assert pipeline.compare(a, c) == {"tokens": np.inf, "levels": np.inf}


def test_growth_is_between_medians():
    memory = [
        {"share": s / 10, "own_mb": 100.0 + 2 * s, "shm_mb": 50.0 + 500 * (s == 9)}
        for s in range(1, 11)
    ]
    # 158, 160, 162 MB early; 168 + 500 and 170 MB late
    # and without shared memory 108, 110, 112 MB early, 118 and 120 MB late
    assert pipeline.growth(memory) == {
        "early_mb": 160.0, "late_mb": 419.0, "growth_mb": 259.0, "growth": 1.6187,
        "own_early_mb": 110.0, "own_late_mb": 119.0, "own_growth_mb": 9.0, "own_growth": 0.0818,
        "shm_peak_mb": 550.0,
    }  # fmt: skip


def test_drain_stops_at_the_images_it_was_told():
    steps = ({"images": 2, "tokens": 5} for _ in range(100))
    found = drain(steps, 7)
    assert found["images"] == 8 and found["tokens"] == 20 and found["first_images"] == 2
    assert next(steps) == {"images": 2, "tokens": 5} and len(list(steps)) == 95
    assert [m["share"] for m in found["memory"]] == [0.286, 0.571, 0.857, 1.143]


def test_a_child_counts_with_its_parent_while_it_lives_and_after():
    pid = os.getpid()
    before, small = processes.cpu_seconds(pid), processes.memory(pid)["own_mb"]
    work = "import sys\nx = bytearray(b'a' * 200_000_000)\nprint(1, flush=True)\nsys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        assert child.pid in processes.tree(pid)
        assert processes.memory(pid)["own_mb"] - small > 190
        assert processes.peak_mb(pid) > 200
        living = processes.cpu_seconds(pid)
        child.stdin.close()
    assert child.pid not in processes.tree(pid)
    assert processes.cpu_seconds(pid) >= living > before
