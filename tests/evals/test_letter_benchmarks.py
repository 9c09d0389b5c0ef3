"""MagnifierBench, ScienceQA and AI2D: questions with options, from their publishers' files."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmjax.data.benchmarks.scienceqa import ScienceQaSource
from mmjax.evals import runner
from mmjax.evals.tasks import make_task, question_of
from mmjax.types import MMJaxError


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def table(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_magnifierbench_strictly_and_as_otter_reads(tmp_path):
    asked = "What colour is the cup? A. a red, dark one, B. Blue, C. green, D. white."
    images = [{"bytes": png(), "path": None}]
    rows = [{"id": f"q{i}", "instruction": asked, "answer": answer, "images": images}
            for i, answer in enumerate(("A", "B.", "(C) green"))]  # fmt: skip
    path = table(tmp_path / "test.parquet", rows)
    seen = []

    def say(records, *_):
        seen.extend(records)
        return ["A man holds it", "Blue", "C. green"]

    task = make_task({"benchmark": "magnifierbench", "path": path})
    strict = runner.evaluate([task], say, progress=False)["magnifierbench"]["test"]
    assert (strict["correct"], strict["n"], strict["chance"]) == (1, 3, 0.25)
    assert seen[0].meta["choices"] == ["a red, dark one", "Blue", "green", "white"]
    assert seen[0].messages[0].text == (
        "Answer with the option letter from the given choices directly. " + asked
    )
    otter = make_task({"benchmark": "magnifierbench", "path": path, "scorer":
                       "multiple_choice_otter"})  # fmt: skip
    lenient = runner.evaluate([otter], say, progress=False)["magnifierbench"]["test"]
    assert lenient["correct"] == 3  # "A man" is A, and the B of "Blue" is B
    rows[1]["answer"] = "Blue"
    table(tmp_path / "test.parquet", rows)
    with pytest.raises(MMJaxError, match=":1: the answer is 'Blue'; expected a letter"):
        runner.evaluate([task], say, progress=False)
    table(tmp_path / "test.parquet", [{"id": "q", "answer": "A", "images": images}])
    with pytest.raises(MMJaxError, match="has no column instruction"):
        runner.evaluate([task], say, progress=False)


def test_ai2d_from_the_hub(tmp_path):
    rows = [
        {"question": "Which is it?", "options": ["x", "A", "z"], "answer": answer,
         "image": {"bytes": png(), "path": None}} for answer in ("1", "2")
    ]  # fmt: skip
    path = table(tmp_path / "test-00000-of-00001.parquet", rows)
    asked = []

    def say(records, *_):
        asked.extend(records)
        return ["B", "B."]

    task = make_task({"benchmark": "ai2d", "path": path})
    found = runner.evaluate([task], say, progress=False)["ai2d"]["test"]
    assert (found["n"], found["correct"], found["chance"]) == (2, 1, pytest.approx(1 / 3))
    assert asked[1].images == (png(),) and asked[1].meta["answers"] == ["C"]
    assert asked[0].messages[0].text == (
        "Which is it?\nA. x\nB. A\nC. z\n"
        "Answer with the option's letter from the given choices directly."
    )
    table(tmp_path / "test-00000-of-00001.parquet", [rows[0] | {"answer": "3"}])
    with pytest.raises(MMJaxError, match=":0: the answer is '3' of 3 options; expected a number"):
        runner.evaluate([task], say, progress=False)


PROBLEMS = {
    "1": {"question": "Which?", "choices": ["x", "B"], "answer": 0, "hint": "Look.",
          "image": "image.png", "subject": "natural science"},
    "2": {"question": "Why?", "choices": ["p", "q", "r"], "answer": 2, "hint": "", "image": None,
          "subject": "language science"},
}  # fmt: skip


@pytest.fixture
def scienceqa(tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"val": ["1", "2"], "test": []}))
    (tmp_path / "images/val/1").mkdir(parents=True)
    (tmp_path / "images/val/1/image.png").write_bytes(png())
    return {"path": str(tmp_path / "problems.json"), "images": str(tmp_path / "images")}


def test_scienceqa_with_pictures_and_with_all(scienceqa):
    settings = scienceqa | {"benchmark": "scienceqa", "split": "val"}
    say = lambda records, *_: ["A"] * len(records)  # noqa: E731
    found = runner.evaluate([make_task(settings)], say, progress=False)["scienceqa"]
    assert list(found) == ["val"] and (found["val"]["n"], found["val"]["correct"]) == (1, 1)
    source = ScienceQaSource(**scienceqa, split="val", pictures_only=False)
    assert question_of(source[0]) == "Context: Look.\nWhich?\nA. x\nB. B"
    assert [len(source[i].images) for i in range(2)] == [1, 0]
    assert source[1].meta["answers"] == ["C"] and source[1].meta["group"] == "language science"


def test_scienceqa_from_the_hub(tmp_path):
    rows = [p | {"image": p["image"] and {"bytes": png(), "path": None}} for p in PROBLEMS.values()]
    path = table(tmp_path / "test.parquet", rows)
    (only,) = ScienceQaSource(path)
    assert only.images == (png(),) and only.meta["choices"] == ["x", "B"]
    assert len(ScienceQaSource(path, pictures_only=False)[1].images) == 0


def test_bad_scienceqa_files_are_named(scienceqa, tmp_path):
    def refused(**changes):
        with pytest.raises(MMJaxError) as error:
            ScienceQaSource(**({"split": "val"} | scienceqa | changes))
        return str(error.value)

    assert "has no split 'dev'; it has val, test" in refused(split="dev")
    assert "holds no questions with a picture" in refused(split="test")
    assert "give images, the folder with a folder for each" in refused(images=None)
    (tmp_path / "images/val/1/image.png").unlink()
    assert "problem 1: the picture '1/image.png' is not in" in refused()
    (tmp_path / "images/val/1/image.png").write_bytes(png())
    bad = PROBLEMS | {"1": PROBLEMS["1"] | {"answer": 2}}
    (tmp_path / "problems.json").write_text(json.dumps(bad))
    assert "problem 1: the answer is 2 of 2 options; expected 0 to 1" in refused()
