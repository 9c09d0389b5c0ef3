"""MME from its publishers' folders, and from the hub's parquet, to the sums of scores."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmjax.evals import report, runner, summaries
from mmjax.evals.tasks import make_task
from mmjax.types import BadSample, MMJaxError

ASKED = "Is there a {}? Please answer yes or no."


@pytest.fixture
def folder(tmp_path):
    """count and OCR with texts beside the pictures, posters with a folder for each."""
    root = tmp_path / "MME_Benchmark"
    for subtask, names in (("count", ("0.jpg", "1.jpg")), ("code_reasoning", ("0.png",))):
        (root / subtask).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (6, 6)).save(root / subtask / name)
            text = f"{ASKED.format('dog')}\tYes\n{ASKED.format('cat')}\tNo\n"
            (root / subtask / name).with_suffix(".txt").write_text(text)
    for inner in ("images", "questions_answers_YN"):
        (root / "posters" / inner).mkdir(parents=True)
    Image.new("RGB", (6, 6)).save(root / "posters/images/tt1.jpg")
    text = f"{ASKED.format('hat')}\tYes\n{ASKED.format('cap')}\tNo"
    (root / "posters/questions_answers_YN/tt1.txt").write_text(text)
    return root


def say_yes_but_once(records, *_):
    """Right about both questions of count/0 alone; of a poster nothing that can be read."""
    out = []
    for record in records:
        text = record.messages[-1].text
        assert text.endswith("? Please answer yes or no.")
        first = record.meta["unit"] == "count/0.jpg" and "cat" in text
        out.append("no" if first else "Hm" if "hat" in text else "Yes, there is")
    return out


def test_scores_are_accuracy_and_accuracy_plus(folder, tmp_path):
    task = make_task({"benchmark": "mme", "path": str(folder)})
    found = runner.evaluate([task], say_yes_but_once, workdir=tmp_path, progress=False)
    whole = found["mme"]["test"]
    assert (whole["n"], whole["correct"]) == (8, 4)
    groups = {name: group["metrics"] for name, group in whole["groups"].items()}
    scores = {name: metrics["score"] for name, metrics in groups.items()}
    # count 3 of 4 and 1 of 2 pictures, code 1 of 2 and 0 of 1, posters 0 of 2 and 0 of 1
    assert scores == {
        "code_reasoning": {"value": 50.0, "of": 200},
        "count": {"value": 125.0, "of": 200},
        "posters": {"value": 0.0, "of": 200},
    }
    assert groups["count"]["accuracy+"] == {"value": 0.5, "of": 1}
    assert groups["posters"]["neither"]["value"] == 0.5
    assert whole["metrics"]["perception"] == {"value": 125.0, "of": 400}
    assert whole["metrics"]["cognition"] == {"value": 50.0, "of": 200}
    assert whole["metrics"]["accuracy+"]["value"] == 0.25
    html = Path(report.report_workdir(tmp_path)).read_text()
    assert "125.0 of 400" in html and '<th scope="col">accuracy+</th>' in html


def test_a_unit_is_right_where_all_of_it_is():
    rows = [{"unit": u, "score": s} for u, s in (("a", 0), ("a", 1), ("b", 1), ("c", 1), ("b", 1))]
    assert summaries.units_right(rows) == {"value": 0.666667, "of": 1}
    lost = [{"score": 0.0}, {"score": 0.0}]  # of what could not be read nothing is known
    assert summaries.units_right(rows + lost) == {"value": 0.4, "of": 1}


def test_a_limit_takes_whole_pictures(folder):
    task = make_task({"benchmark": "mme", "path": str(folder), "limit": 5})
    found = runner.evaluate([task], say_yes_but_once, progress=False)["mme"]["test"]
    assert found["n"] == 4
    one = make_task({"benchmark": "mme", "path": str(folder), "limit": 1})
    assert runner.evaluate([one], say_yes_but_once, progress=False)["mme"]["test"]["n"] == 2


def test_a_picture_that_cannot_be_read_counts_in_its_subtask(folder):
    def say(records, *_):
        lost = [r.meta["unit"] == "count/1.jpg" for r in records]
        return [
            BadSample("corrupt_image", "cut off") if gone else r.meta["answers"][0]
            for gone, r in zip(lost, records, strict=True)
        ]

    task = make_task({"benchmark": "mme", "path": str(folder)})
    whole = runner.evaluate([task], say, progress=False)["mme"]["test"]
    assert whole["unreadable"] == 2
    assert whole["groups"]["count"]["metrics"]["score"]["value"] == 100.0


def test_the_hubs_parquet_and_the_instruction_taken_away(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6)).save(buffer, "PNG")
    rows = [
        {"question_id": f"OCR/{n}.png", "image": {"bytes": buffer.getvalue(), "path": None},
         "question": ASKED.format(thing), "answer": answer, "category": "OCR"}
        for n in "ab" for thing, answer in (("dog", "Yes"), ("cat", "No"))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000.parquet")
    asked = []

    def say(records, *_):
        asked.extend(r.messages[-1].text for r in records)
        assert all(r.images[0] == buffer.getvalue() for r in records)
        return [r.meta["answers"][0] for r in records]

    settings = {"benchmark": "mme", "path": str(tmp_path), "instruction": False}
    whole = runner.evaluate([make_task(settings)], say, progress=False)["mme"]["test"]
    assert whole["metrics"]["perception"] == {"value": 200.0, "of": 200}
    assert asked == ["Is there a dog?", "Is there a cat?"] * 2
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "test-00000.parquet")
    with pytest.raises(MMJaxError, match=r":2: picture OCR/b.png has 1 question"):
        runner.evaluate([make_task(settings)], say, progress=False)


def test_bad_folders_are_named(folder):
    def refused():
        with pytest.raises(MMJaxError) as error:
            runner.evaluate([make_task({"benchmark": "mme", "path": str(folder)})], None)
        return str(error.value)

    text = folder / "count/1.txt"
    text.write_text(f"{ASKED.format('dog')}\tYes\n")
    assert f"{text}:1: picture count/1.jpg has 1 question(s)" in refused()
    text.write_text("Is there a dog? Yes\n")
    assert f"{text}:1: 'Is there a dog? Yes' has no tab" in refused()
    text.write_text("Is there a dog?\tMaybe\n")
    assert f"{text}:1: the answer is 'Maybe'" in refused()
    (folder / "count/1.jpg").unlink()
    assert f"{text}:1: there is no picture 1.jpg" in refused()
    (folder / "count").rename(folder / "counting")
    (folder / "counting/1.txt").unlink()
    assert "0.txt:1: 'counting' is no subtask of MME" in refused()
