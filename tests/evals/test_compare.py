"""Runs side by side, and the same questions about enlarged pictures."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from mmjax.data.magnifier import MagnifierSource
from mmjax.evals import compare, runner
from mmjax.evals.tasks import Task
from mmjax.types import MMJaxError


def entry(accuracy, side, n=100, **more):
    return dict(accuracy=accuracy, n=n, ci95=[accuracy - 0.1, accuracy + 0.1], correct=1,
                longest_side=side, resolution=side, step=30, chance=0.1) | more  # fmt: skip


def write_run(folder, accuracies, task="digits", **more):
    folder.mkdir()
    results = {task: {str(side): entry(a, side) for side, a in accuracies.items()}} | more
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    low = write_run(tmp_path / "low", {96: 0.3, 48: 0.6})
    return [low, "mixed=" + write_run(tmp_path / "b", {96: 0.7, 48: 0.5})]


def test_the_table_names_the_best_of_every_size(runs, tmp_path, capsys):
    out = tmp_path / "docs" / "sizes.md"
    compare.main([*runs, "--task", "digits", "--out", str(out)])
    text = out.read_text()
    assert text.split("\n")[1:5] == [
        "| longest side | low | mixed |",
        "|---|---:|---:|",
        "| 48 | **60.0%** (50.0 to 70.0) | 50.0% (40.0 to 60.0) |",
        "| 96 | 30.0% (20.0 to 40.0) | **70.0%** (60.0 to 80.0) |",
    ]
    assert "100 questions a cell, 95 % intervals. Steps trained: low 30, mixed 30." in text
    assert f"--task digits --out {out}" in text and "](sizes.svg)" in text
    assert capsys.readouterr().out.strip() in text


def test_the_plot_stands_alone(runs, tmp_path):
    compare.main([*runs, "--out", str(tmp_path / "sizes.md")])
    svg = ET.parse(tmp_path / "sizes.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert svg.tag == f"{space}svg"
    assert "--card:" in svg.find(f"{space}style").text
    texts = [t.text for t in svg.iter(f"{space}text")]
    assert {"low", "mixed", "48", "96", "chance 10%", "accuracy"} <= set(texts)
    assert len([g for g in svg.iter(f"{space}g") if g.get("class") == "point"]) == 4


def test_words_around_the_table_are_kept(runs, tmp_path):
    out = tmp_path / "sizes.md"
    out.write_text("# Sizes\n\nWhy.\n")
    compare.main([*runs, "--out", str(out)])
    first = out.read_text()
    assert first.startswith("# Sizes\n\nWhy.\n\n" + compare.BEGIN)
    out.write_text(first.replace("Why.", "Wherefore.") + "\nThe end.\n")
    compare.main([runs[1], "--out", str(out)])
    second = out.read_text()
    assert second.startswith("# Sizes\n\nWherefore.\n") and second.endswith("\nThe end.\n")
    assert second.count(compare.BEGIN) == 1 and "low" not in second


def test_a_run_is_called_as_its_folder_and_out_is_a_file(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path / "low")
    compare.main([".", runs[1], "--out", "sizes.md"])
    assert capsys.readouterr().out.startswith("| longest side | low | mixed |\n")
    with pytest.raises(MMJaxError, match=f"--out {tmp_path} is a folder; give .*/compare.md"):
        compare.main([".", "--out", str(tmp_path)])


def test_runs_that_cannot_be_compared_are_named(runs, tmp_path):
    with pytest.raises(MMJaxError, match=r"none has no results.json.*python eval.py"):
        compare.read_runs([str(tmp_path / "none")])
    with pytest.raises(MMJaxError, match="no task 'digit'; it has digits"):
        compare.read_runs(runs, "digit")
    with pytest.raises(MMJaxError, match="two runs are called 'low'"):
        compare.read_runs([runs[0], runs[0]])
    other = write_run(tmp_path / "c", {24: 0.1})
    with pytest.raises(MMJaxError, match="run 'c' was asked at 24 and 'low' at 96, 48"):
        compare.read_runs([runs[0], other])
    for what, value in (("n", 50), ("scorer", "vqa_accuracy"), ("shots", 4), ("longest_side", 80)):
        folder = tmp_path / what
        write_run(folder, {})
        asked = {"digits": {k: entry(0.5, int(k)) | {what: value} for k in ("96", "48")}}
        (folder / "results.json").write_text(json.dumps(asked))
        with pytest.raises(MMJaxError, match=f"{what} is .* in 'low' and {value} in '{what}'"):
            compare.read_runs([runs[0], str(folder)])
    two = write_run(tmp_path / "d", {24: 0.1}, more={})
    with pytest.raises(MMJaxError, match="several tasks, digits, more: give --task"):
        compare.read_runs([two])


@pytest.mark.parametrize("enlarge, seen", [(False, (32, 32)), (True, (24, 80))])
def test_a_larger_size_enlarges_only_where_the_task_says_so(enlarge, seen):
    shapes = {}

    def answer(records, resolution, _):
        shapes[resolution] = {np.shape(r.images[0]) for r in records}
        return ["7"] * len(records)

    source = MagnifierSource("test", image_size=32, size=6)
    task = Task("digits", source, resolutions=(24, 80), enlarge=enlarge)
    got = runner.evaluate([task], answer, progress=False)["digits"]
    # Without it, whoever answers reduces.
    small, large = seen
    assert shapes == {24: {(small, small, 3)}, 80: {(large, large, 3)}}
    assert [e["longest_side"] for e in got.values()] == [24, large]
