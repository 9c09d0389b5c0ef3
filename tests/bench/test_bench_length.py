"""The length suite: the same tokens in longer rows cost what attention's scores do, and no more."""

import jax
import pytest

from bench import length, report
from bench.cases import TINY, Case


def case():
    (found,) = length.length_cases(True, "cpu")
    return found


def test_flops_grow_by_attentions_scores_alone():
    first, second = (
        length._flops(
            Case("length", "", {"b": 128 // t, "t": t, "targets": t // 16}, 0, "", 0, TINY)
        )
        for t in case().options["lengths"]
    )
    # Scores and their weighted sum are 4 t d operations a token and layer forward, of which
    # causality leaves half, and twice that backward; the last layer runs at the targets alone.
    scores = 3 * 128 * (64 - 32) * 2 * TINY.d * (TINY.layers - 1 + 1 / 16)
    patches = 3 * (2 * 47 - 4 * 23) * 2 * TINY.patch_dim * TINY.d  # two more fit into fewer rows
    assert second - first == scores + patches


@pytest.mark.heavy
def test_a_survey_times_each_length_and_the_report_has_it():
    found = length.Length(case(), "", "").survey()
    assert [(x["t"], x["b"]) for x in found["lengths"]] == [(32, 4), (64, 2)]
    one, two = found["lengths"]
    assert one["time_growth"] == one["flops_growth"] == 1
    assert two["time_growth"] == pytest.approx(two["ms"] / one["ms"], rel=0.05)
    assert two["flops_growth"] == pytest.approx(two["gflop"] / one["gflop"], abs=0.5)
    row = {"suite": "length", "case": case().name, "options": case().options, **found}
    row |= {"ours_impl": "", "peer_impl": None, "parity_err": None, "parity_ok": None}
    (_, cells) = report.table([row])
    assert f"T 64: {two['ms']:g} ms" in cells[-1]
    assert jax.default_backend() == "cpu"
