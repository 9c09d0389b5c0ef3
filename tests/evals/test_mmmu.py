"""MMMU from its publishers' files to the accuracy of subjects and disciplines."""

import json

import pytest

from mmjax.data.benchmarks.mmmu import SUBJECTS, MmmuSource
from mmjax.evals import compare, mmmu, runner
from mmjax.evals.tasks import make_task
from mmjax.types import BadSample, MMJaxError
from tests.evals.mmmu_files import png, question, save

LETTER = "\n\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "MMMU"
    save(folder, "Art_Theory", [
        question("validation_Art_Theory_1", "Which one? <image 1>", ["<image 2>", "<image 3>"], "B",
                 pictures=3),
        question("validation_Art_Theory_2", "<image 1> Is <image 1> old?", ["A", "B", "C"], "B"),
    ])  # fmt: skip
    save(folder, "Geography", [
        question("validation_Geography_1", "Where is it?", [], "['Tampa', 'Florida']", pictures=2),
        question("validation_Geography_2", "How far?<image 1>", [], "1,249.5"),
    ])  # fmt: skip
    save(folder, "Geography", [question("test_Geography_1", "Far?<image 1>", [], "?")], "test")
    return folder


def test_pictures_stand_where_they_are_named(hub):
    source = MmmuSource(hub)
    assert [r.meta["id"].removeprefix("validation_") for r in source] == [
        "Art_Theory_1", "Art_Theory_2", "Geography_1", "Geography_2"
    ]  # fmt: skip
    several, again, unnamed, _ = source
    assert several.messages[0].text == "Which one? <image>\n(A) <image>\n(B) <image>" + LETTER
    assert several.images == (png(1), png(2), png(3))
    assert several.meta["choices"] == ["<image 2>", "<image 3>"]
    assert again.messages[0].text == "<image> Is <image 1> old?\n(A) A\n(B) B\n(C) C" + LETTER
    assert again.images == (png(1),) and again.meta["answers"] == ["(B)"]
    assert unnamed.messages[0].text == "<image><image>Where is it?" + PHRASE
    assert unnamed.images == (png(1), png(2))
    assert unnamed.meta["answers"] == ["Tampa", "Florida"] and "choices" not in unnamed.meta


def test_the_pictures_of_one_subject_alone_are_kept(hub):
    source = MmmuSource(hub)
    for _ in range(2):
        kept = [(source[i], sum(len(t._files._kept) for t in source.tables))[1] for i in range(4)]
        assert kept == [1, 1, 1, 1]


def test_pictures_in_front_and_bunnys_one(hub):
    front, bunny = (MmmuSource(hub, layout=name)[0] for name in ("front", "bunny"))
    text = "Which one? <image 1>\n(A) <image 2>\n(B) <image 3>" + LETTER
    assert front.messages[0].text == bunny.messages[0].text == text
    assert front.images == (png(1), png(2), png(3)) and bunny.images == (png(1),)
    bare = MmmuSource(hub, instruction=False)
    assert bare[3].messages[0].text == "How far?<image>"
    with pytest.raises(MMJaxError, match="layout is 'llava'; it is one of interleaved, front"):
        MmmuSource(hub, layout="llava")


def test_a_named_picture_that_is_missing_is_one_that_cannot_be_read(hub):
    save(hub, "Music", [question("validation_Music_1", "<image 1><image 2>?", [], "x")])
    assert list(MmmuSource(hub))[-1].images == (png(1), b"")


SAID = {
    "validation_Art_Theory_1": "(A) or rather (B)",  # the last: right
    "validation_Art_Theory_2": "no idea",  # unread
    "validation_Geography_1": "It is in Tampa, I think",
    "validation_Geography_2": "The answer is 1250",
}


def say(records, resolution, max_new_tokens):
    assert max_new_tokens == 128
    return [SAID[r.meta["id"]] for r in records]


def test_subjects_and_disciplines(hub, tmp_path):
    task = make_task({"benchmark": "mmmu", "path": str(hub)})
    found = runner.evaluate([task], say, workdir=tmp_path / "run", progress=False)
    assert list(found["mmmu"]) == ["validation"]
    whole = found["mmmu"]["validation"]
    assert (whole["n"], whole["correct"]) == (4, 2)
    assert whole["chance"] == pytest.approx((1 / 2 + 1 / 3) / 4)
    assert {k: g["accuracy"] for k, g in whole["groups"].items()} == {
        "Art_Theory": 0.5, "Geography": 0.5
    }  # fmt: skip
    assert {k: m["value"] for k, m in whole["metrics"].items()} == {
        "Art and Design": 0.5, "Science": 0.5, "options": 0.5, "open": 0.5, "unread": 0.5
    }  # fmt: skip
    assert "metrics" not in whole["groups"]["Geography"]
    sent = json.loads((tmp_path / "run/predictions/mmmu.validation.json").read_text())
    assert sent == SAID | {"validation_Art_Theory_1": "B"}
    assert runner.as_metrics(found)["eval/mmmu/Art_and_Design"] == 0.5


def test_runs_with_other_layouts_are_not_compared(hub, tmp_path):
    for layout in ("front", "bunny"):
        task = make_task({"benchmark": "mmmu", "path": str(hub), "layout": layout})
        found = runner.evaluate([task], say, workdir=tmp_path / layout, progress=False)
        assert found["mmmu"]["validation"]["source"] == (
            f"mmmu, split=validation, layout={layout}, instruction=True"
        )
    runs = [str(tmp_path / layout) for layout in ("front", "bunny")]
    with pytest.raises(MMJaxError, match="source is mmmu, .* layout=front, .* in 'front' and mmmu"):
        compare.read_runs(runs)


def test_the_publishers_guess_is_the_same_every_time(hub):
    guesses = {mmmu.guess_option(f"no idea {i}", ["x", "y", "z"]) for i in range(20)}
    assert guesses == {"A", "B", "C"}
    assert len({mmmu.guess_option("no idea", ["x", "y", "z"]) for _ in range(3)}) == 1
    letter = mmmu.guess_option("no idea", ["A", "B", "C"])
    task = make_task({"benchmark": "mmmu", "path": str(hub), "scorer": "mmmu_guess"})
    whole = runner.evaluate([task], say, progress=False)["mmmu"]["validation"]
    assert whole["metrics"]["unread"]["value"] == 0.0
    assert whole["correct"] == 2 + (letter == "B")


def test_a_test_split_is_asked_and_not_scored(hub, tmp_path):
    task = make_task({"benchmark": "mmmu", "path": str(hub), "split": "test"})
    tell = lambda records, *_: ["12 km"] * len(records)  # noqa: E731
    assert runner.evaluate([task], tell, workdir=tmp_path, progress=False) == {}
    sent = json.loads((tmp_path / "predictions/mmmu.test.json").read_text())
    assert sent == {"test_Geography_1": "12 km"}


def test_answers_from_the_publishers_file(hub, tmp_path):
    answers = {
        "validation_Art_Theory_1": {"question_type": "multiple-choice", "ground_truth": "A"},
        "validation_Art_Theory_2": {"question_type": "multiple-choice", "ground_truth": "C"},
        "validation_Geography_1": {"question_type": "short-answer", "ground_truth": ["a", "b"]},
    }
    path = tmp_path / "answer_dict_val.json"
    path.write_text(json.dumps(answers))
    with pytest.raises(MMJaxError, match=f"{path} has no answer to question 'validation_Geography"):
        MmmuSource(hub, annotations=path)
    last = {"question_type": "short-answer", "ground_truth": "7"}
    path.write_text(json.dumps(answers | {"validation_Geography_2": last}))
    source = MmmuSource(hub, annotations=path)
    assert [r.meta["answers"] for r in source] == [["A"], ["(C)"], ["a", "b"], ["7"]]
    path.write_text("[]")
    with pytest.raises(MMJaxError, match="holds no object of answers by the questions' ids"):
        MmmuSource(hub, annotations=path)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(c)", None),
        ("b", None),
        ("A man stands there", "A"),  # the article, in its code too
        ("A or B", "B"),
        ("(A), not B", "A"),
        ("B.'", None),  # points go before quotes, once
        ("B'.", "B"),
        ("B: the dog", None),
        ("it is the red one of them", "C"),
        ("IT IS THE RED ONE OF THEM", "C"),
        ("the red one", None),  # too short to be looked through
        ("it is the red one", None),  # five words still are
        ("first I saw red and then a cat", "A"),  # the option that stands last
        ("", None),
    ],
)
def test_how_options_are_read(text, letter):
    """By hand after parse_multi_choice_response of MMMU's eval_utils.py."""
    assert mmmu.read_option(text, ["a cat", "dog", "Red"]) == letter


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("36 watts", ["36 watts", 36.0]),
        ("The answer is 1,234.567", [1234.57, 1234.0, 234.57]),
        ("x = 2.5e3", [2500.0, 2.0, 3.0]),  # pieces of numbers, too
        ("It is 5.\nSo x=7", [5.0, 7.0]),
        ("x = 3\nIt is 5", [5.0]),  # an equation counts in the last line alone
        ("It is an a. So b is cd", ["cd"]),
        ("Tampa", ["tampa"]),
        (" It IS TAMPA.\n", ["tampa"]),
        ("k", [" k", "k "]),
        ("-0.286", [-0.29]),
    ],
)
def test_what_open_answers_say(text, says):
    """By hand after parse_open_response of MMMU's eval_utils.py."""
    assert sorted(map(str, mmmu.read_open(text))) == sorted(map(str, says))


def test_options_by_hand():
    for scorer in (mmmu.mmmu, mmmu.mmmu_guess):
        assert scorer("It is (B).", ["B"], ["x", "y"]) == scorer("B", ["(B)"], ["A", "B"]) == 1
        assert scorer("It is (B).", ["A"], ["x", "y"]) == 0
    assert mmmu.mmmu("neither", ["A"], ["x", "y"]) == mmmu.mmmu("neither", ["B"], ["x", "y"]) == 0
    guess = mmmu.guess_option("neither", ["x", "y"])
    assert [mmmu.mmmu_guess("neither", [x], ["x", "y"]) for x in "AB"] == [guess == x for x in "AB"]


def test_open_answers_by_hand():
    assert mmmu.mmmu("about 30 m", ["30.001"]) == 1  # two decimals
    assert mmmu.mmmu("25% or 30%", ["30"]) == 1  # one of several is enough
    assert mmmu.mmmu("in Tampa", ["Tampa", "Florida"]) == 1
    assert mmmu.mmmu("north", ["no"]) == 1  # a text anywhere within
    assert mmmu.mmmu("taxi", ["x"]) == 0 and mmmu.mmmu("the x axis", ["x"]) == 1
    assert mmmu.mmmu("31", ["30"]) == 0
    with pytest.raises(BadSample, match="the right answer is 'D', none of 2 options"):
        mmmu.mmmu("A", ["D"], ["x", "y"])


def test_bad_files_are_named(hub, tmp_path):
    assert len(SUBJECTS) == 30

    def refused(row, **changes):
        path = save(tmp_path / "bad", "Art", [question(*row) | changes])
        with pytest.raises(MMJaxError) as error:
            MmmuSource(path)
        return str(error.value).replace(path, "FILE")

    good = ("validation_Art_1", "?", ["x", "y"], "A")
    assert "FILE:0: the answer is 'C', none of the options A, B" in refused((*good[:3], "C"))
    assert "FILE:0: 'x, y' is no list" in refused(good, options="x, y")
    assert "FILE:0: 1 options; expected 2 to 26" in refused(good, options="['x']")
    assert "names the subject 'Cooking', none of" in refused(("validation_Cooking_1", *good[1:]))
    with pytest.raises(MMJaxError, match="holds no dev-.*; there is test, validation: set split"):
        MmmuSource(hub, split="dev")
    save(hub, "Design", [question("validation_Geography_1", "?", [], "x")])
    with pytest.raises(MMJaxError, match="question 'validation_Geography_1' stands at"):
        MmmuSource(hub)
