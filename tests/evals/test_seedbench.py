"""SEED-Bench and SEED-Bench-2 from their publishers' files to the accuracy of question types."""

import json

import pytest
from PIL import Image

from mmjax.data.benchmarks.seedbench import SeedBenchSource
from mmjax.evals import runner
from mmjax.evals.tasks import make_task
from mmjax.types import MMJaxError

TYPES = {"Instances Counting": 5, "Action Prediction": 11, "Difference Spotting": 17,
         "In-Context Captioning": 23, "Next Image Prediction": 26}  # fmt: skip


def question(name, kind, picture, answer, form="image", **more):
    choices = {f"choice_{letter}": word for letter, word in zip("abcd", ("One", "B", "3", "4"),
                                                                strict=True)}  # fmt: skip
    row = {"answer": answer, **choices, "data_id": picture, "data_type": form}
    return row | {"question": "How many?", "question_id": name, "question_type_id": kind} | more


def save(path, questions):
    path.write_text(json.dumps({"questions": questions, "question_type": TYPES}))
    return str(path)


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(folder / name, "PNG")
    return str(folder)


@pytest.fixture
def first(tmp_path):
    rows = [
        question("101669", 5, "1454426_2591111986", "A"),
        question("101670", 5, "1454426_2591111986", "B"),
        question("v1962", 11, "P03/P03_24.MP4", "C", "video", segment=[648.0, 658.0]),
    ]
    return {
        "benchmark": "seedbench",
        "path": save(tmp_path / "SEED-Bench.json", rows),
        "images": pictures(tmp_path / "SEED-Bench-image", "1454426_2591111986"),
    }


def say(records, *_):
    asked = "How many?\nA. One\nB. B\nC. 3\nD. 4\nAnswer with the option's letter from the given "
    assert all(r.messages[0].text == asked + "choices directly." for r in records)
    return [{"101669": "A.", "101670": "Three", "v1962": "C"}[r.meta["id"]] for r in records]


def test_ranked_options_of_a_question_that_stands_alone(first, tmp_path):
    class Ranks:
        def rank(self, records, options, resolution, *, mean):
            assert [r.messages[0].text for r in records] == ["Question: How many?\nAnswer:"] * 2
            assert options == [["One", "B", "3", "4"]] * 2 and not mean
            return [[-1.0, -2.0, -3.0, -4.0]] * 2

    ranked = {"layout": "question", "rank": "likelihood", "prompt": "Question: {question}\nAnswer:"}
    task = make_task(first | ranked)
    found = runner.evaluate([task], Ranks(), workdir=tmp_path / "run", progress=False)
    assert (found["seedbench"]["test"]["n"], found["seedbench"]["test"]["correct"]) == (2, 1)
    sent = (tmp_path / "run/predictions/seedbench.test.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in sent] == ["A", "A"]
    with pytest.raises(MMJaxError, match="layout is 'letters'; it is 'options' or 'question'"):
        SeedBenchSource(first["path"], first["images"], layout="letters")


def test_the_pictures_alone(first, tmp_path):
    found = runner.evaluate([make_task(first)], say, workdir=tmp_path / "run", progress=False)
    whole = found["seedbench"]["test"]
    assert (whole["n"], whole["correct"], whole["chance"]) == (2, 1, 0.25)
    assert whole["metrics"] == {"image": {"value": 0.5, "of": 1}}
    assert {k: g["accuracy"] for k, g in whole["groups"].items()} == {"Instances Counting": 0.5}
    sent = (tmp_path / "run/predictions/seedbench.test.jsonl").read_text().splitlines()
    assert json.loads(sent[0]) == {"question_id": "101669", "prediction": "A"}
    # as LLaVA's and Bunny's convert_seed_for_submission.py, which compares letters as they stand
    strict = make_task(first | {"scorer": "exact_match_strict"})
    assert runner.evaluate([strict], say, progress=False)["seedbench"]["test"]["correct"] == 0


def test_with_a_frame_of_each_video(first, tmp_path):
    frames = pictures(tmp_path / "SEED-Bench-video-image", "11_v1962.png")
    task = make_task(first | {"frames": frames})
    whole = runner.evaluate([task], say, progress=False)["seedbench"]["test"]
    assert (whole["n"], whole["correct"]) == (3, 2)
    assert {k: m["value"] for k, m in whole["metrics"].items()} == {"image": 0.5, "video": 1.0}
    assert SeedBenchSource(first["path"], first["images"], frames)[1].meta["answers"] == ["(B)"]


@pytest.fixture
def second(tmp_path):
    own = {"data_source": "SEED-Bench v2", "version": "v2"}
    rows = [
        question("5_0", 5, "77_1", "A", "Single Image", level="L1", data_source="cc3m"),
        question("17_0", 17, ["task17/a_1.png", "task17/a_2.png"], "B", "Multiple Images",
                 level="L1", **own),
        question("23_0", 23, ["task23/1.jpg", "task23/2.jpg"], "D", "Interleaved Image",
                 level="L2", **own) | {"question": "<img>: blue. [img]:"},
        question("26_0", 26, ["task26/1.png"], "B", "Image Generation", level="L3", **own),
    ]  # fmt: skip
    return {
        "path": save(tmp_path / "SEED-Bench_v2_level1_2_3.json", rows),
        "images": pictures(tmp_path / "cc3m", "77_1"),
        "images_v2": pictures(tmp_path / "v2", "task17/a_1.png", "task17/a_2.png", "task23/1.jpg",
                              "task23/2.jpg"),
    }  # fmt: skip


def test_the_second_has_several_pictures_and_levels(second):
    single, several, between = SeedBenchSource(**second)
    assert single.images == (f"{second['images']}/77_1",)
    assert several.images == tuple(f"{second['images_v2']}/task17/a_{i}.png" for i in (1, 2))
    assert "<image>" not in several.messages[0].text
    assert between.messages[0].text.startswith("<image>: blue. <image>:\nA. One")
    assert between.meta["group"] == "In-Context Captioning" and len(between.images) == 2
    assert [r.meta["id"] for r in SeedBenchSource(**second, level="L1")] == ["5_0", "17_0"]


def test_bad_files_are_named(first, second, tmp_path):
    def refused(*rows, **changes):
        given = {k: v for k, v in (first | changes).items() if k != "benchmark"}
        given |= {"path": save(tmp_path / "bad.json", rows)} if rows else {}
        with pytest.raises(MMJaxError) as error:
            SeedBenchSource(**given)
        return str(error.value)

    good = ("1", 5, "1454426_2591111986", "A")
    assert "question 0: the picture '3' is not in" in refused(question("1", 5, "3", "A"))
    assert "question 1: question '1' stands at" in refused(*[question(*good)] * 2)
    assert "question 0: the answer is 'E', none of" in refused(question(*good[:3], "E"))
    assert "question_type_id is 9, and" in refused(question("1", 9, *good[2:]))
    only = refused(question("v1", 11, "x.MP4", "A", "video"))
    assert "holds no questions about pictures; give SEED-Bench.json" in only
    lost = refused(images_v2=None, path=second["path"], images=second["images"])
    assert "question 1: give images_v2, the folder of SEED-Bench-2-image" in lost
    assert "level is 'L3'; it is 'L1' or 'L2'" in refused(level="L3")
    (tmp_path / "x.json").write_text("[]")
    assert "holds no list 'questions' beside" in refused(path=str(tmp_path / "x.json"))
