"""The benchmark's own code: rows that are complete, parity on the same weights, the document."""

import itertools
import json

import numpy as np
import pytest

from bench import __main__ as cli
from bench import cases, environment, report, runner, suites


@pytest.mark.heavy
def test_quick_rows_of_every_suite_agree_with_the_peer(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--case", "", "--out", str(out)]
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["suite"] for r in rows} == {"train", "decode", "input"}
    for row in rows:
        assert row["parity_ok"] and row["parity_err"] <= row["parity_bound"], row["case"]
        assert row["ours_ms"] > 0 and row["peer_ms"] > 0 and row["ratio"] > 0
        assert {"cpu", "cores", "load_at_start", "commit", "date"} <= row["env"].keys()
        assert {"jax", "flax"} <= row["env"]["versions"]["ours"].keys()
        assert {"torch", "transformers"} <= row["env"]["versions"]["peer"].keys()
        assert row["compile_s"] > 0 or row["suite"] == "input"
    printed = capsys.readouterr().out
    assert all(row["case"] in printed for row in rows)
    text = report.markdown(rows, "python -m bench", "rows.jsonl")
    assert "## Train step" in text and "toy sizes" in text and "GPU" in text


SIZE = {"d": 8, "layers": 1, "heads": 1, "mlp": 8, "vocab": 8, "patch": 8}


def row(**changes):
    base = dict(
        suite="input", case="a", ours_impl="x", peer_impl="y", target=5.0, ours_ms=1.0, peer_ms=4.0,
        ours_per_s=1000.0, peer_per_s=250.0, ratio=4.0, noise=0.1, parity_err=0.0, parity_ok=True,
        parity_bound=0, loaded=False, busy_cores=0.0, quick=False, compile_s=0.0, peer_note="",
        unit="images",        size={}, env=environment.describe({}),
    )  # fmt: skip
    return base | changes


def test_the_document_names_what_misses_its_target_and_what_does_not_count():
    text = report.markdown([row(), row(case="b", ratio=6.0)], "c", "r")
    assert "- input: a, x vs y: 4.00x of 5x" in text and "input: b" not in text
    text = report.markdown([row(parity_ok=False, parity_err=3.0)], "c", "r")
    assert "does not count, parity 3.0" in text
    assert "load 1.5" in report.table([row(loaded=True, busy_cores=1.5)])[1]


def test_the_document_names_every_machine_and_what_it_measured():
    here, there = ({**environment.describe({}), "cpu": name} for name in ("EPYC", "Grace"))
    text = report.markdown([row(env=here), row(suite="train", env=there, size=SIZE)], "c", "r")
    where = text[text.index("## Where") :]
    assert "- input: EPYC, " in where and "- train: Grace, " in where
    where = report.markdown([row(env=here), row(env=here)], "c", "r")
    assert where.count("\n- EPYC, ") == 1 and "input: EPYC" not in where


def test_a_run_that_is_interrupted_leaves_the_rows_of_the_last_one(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    out.write_text("former rows\n")

    def measured(*_, **__):
        yield row()
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_cases", measured)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["--suite", "input", "--out", str(out)])
    assert out.read_text() == "former rows\n"
    (kept,) = (tmp_path / "rows.jsonl.part").read_text().splitlines()
    assert json.loads(kept)["case"] == "a"


def test_parity_is_relative_for_losses_and_a_share_for_tokens():
    a = {"loss": np.array([2.0, 4.0])}
    assert runner.parity("train", a, {"loss": np.array([2.0, 5.0])}) == {"loss": 0.2}
    tokens = {"tokens": np.array([1, 2, 3, 4])}
    assert runner.parity("decode", tokens, {"tokens": np.array([1, 2, 9, 9])}) == {"tokens": 0.5}
    assert runner.parity("decode", tokens, {"tokens": np.zeros(3)}) == {"tokens": float("inf")}


def test_a_case_survives_the_pipe():
    for suite, device in itertools.product(suites.SUITES, ("cpu", "gpu")):
        for case in suites.cases_of(suite, device=device):
            assert cases.Case.from_json(json.loads(json.dumps(case.to_json()))).work == case.work


def test_an_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--suite", "train,decod"])
    assert "unknown suite 'decod'" in capsys.readouterr().err
