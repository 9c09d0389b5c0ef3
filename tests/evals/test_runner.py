import concurrent.futures
import dataclasses
import io
import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmjax.data.images import open_image
from mmjax.data.limits import spread
from mmjax.evals import charts, predictions, report, results, runner
from mmjax.evals.answer import Answerer
from mmjax.evals.table import results_table
from mmjax.evals.tasks import Task, answers_of, make_task, multiple_choice, question_of, vqa
from mmjax.types import BadSample, Message, MMJaxError, Record


def record(i, question, answer, **meta):
    picture = np.full((12, 20, 3), i, np.uint8)
    messages = (Message("user", f"<image>\n{question}"), Message("assistant", answer))
    return Record(messages, (picture,), {"id": f"r{i}", "answers": [answer], **meta})


def colours():
    names = ["red", "blue", "red", "<b>green</b>"]
    found = [record(i, "Colour?", a, group="colour") for i, a in enumerate(names)]
    return found + [record(4 + i, "Is it day?", "yes", group="yes/no") for i in range(2)]


def answer(records, resolution, max_new_tokens):
    if resolution == 5:
        return ["red"] * len(records)
    return [r.meta["answers"][0].upper() for r in records]


def run(tasks, tmp_path=None, **options):
    console = Console(file=io.StringIO(), width=160)
    return runner.evaluate(tasks, answer, workdir=tmp_path, console=console, **options)


def test_a_report_shows_all_pictures_of_a_question_and_frames_of_a_video(tmp_path):
    def asked(i, *images):
        return dataclasses.replace(record(i, "Which?", "a"), images=images)

    shades = [np.full((8, 8, 3), i, np.uint8) for i in range(40)]
    several, unreadable, video = asked(0, *shades[:3]), asked(1, shades[0], b"no"), (*shades[:3],)
    records = [several, unreadable, asked(2, video, shades[3]), asked(3, *shades)]
    run([vqa("which", records)], tmp_path)
    lines = (tmp_path / "predictions/which.jsonl").read_text().splitlines()
    kept = [json.loads(line)["pictures"] for line in lines]
    assert [len(paths) for paths in kept] == [3, 1, 4, 9]
    for i, paths in enumerate(kept):
        found = [int(np.asarray(open_image(tmp_path / path))[0, 0, 0]) for path in paths]
        assert found == [[0, 1, 2], [0], [0, 1, 2, 3], [0, 4, 8, 13, 17, 22, 26, 31, 35]][i]
    page = Path(report.report_workdir(tmp_path, {"name": "several"})).read_text()
    assert [page.count(f"Picture r{i}, ") for i in range(4)] == [3, 1, 4, 9]
    assert "Picture r2, 4 of 4, 8 by 8 pixels" in page and "Picture r1, 8 by 8 pixels" in page
    styles = re.findall(r'class="frame"( style="[^"]*")?', page)
    assert sorted(styles) == ["", *(f' style="--columns:{n}"' for n in (2, 2, 3))]


def test_a_sweep_is_scored_kept_and_reported(tmp_path):
    task = vqa("colours", colours(), resolutions=(None, 5), train=colours()[:3], chance=0.25)
    found = run([task], tmp_path, batch_size=4, step=7)
    full, small = found["colours"]["full"], found["colours"]["5"]
    assert (full["accuracy"], full["n"], full["correct"], full["longest_side"]) == (1.0, 6, 6, 20)
    assert (small["correct"], small["longest_side"], small["step"]) == (2, 5, 7)
    assert small["groups"]["colour"]["accuracy"] == 0.5
    assert full["blind"]["majority"]["correct"] == 2
    assert full["blind"]["question_only"]["groups"]["yes/no"]["accuracy"] == 0.0
    assert json.loads((tmp_path / "results.json").read_text()) == found
    rows = predictions.read_predictions(predictions.predictions_path(tmp_path, "colours"))
    assert len(rows) == 12
    assert rows[7] == {
        "id": "r1",
        "index": 1,
        "task": "colours",
        "resolution": 5,
        "key": "5",
        "question": "Colour?",
        "answer": "blue",
        "group": "colour",
        "prediction": "red",
        "score": 0.0,
        "correct": False,
        "pictures": ["predictions/colours/1.png"],
    }
    metrics = runner.as_metrics(found)
    assert metrics["eval/colours/accuracy"] == 1.0
    assert metrics["eval/colours/accuracy_5"] == pytest.approx(1 / 3, abs=1e-5)
    console = Console(file=io.StringIO(), width=160)
    console.print(results_table(found))
    assert "33.3%" in console.file.getvalue() and "25.0%" in console.file.getvalue()

    (tmp_path / "metrics.jsonl").write_text('{"step":1,"train/loss":2}\n{"step":2,"train/loss":1}')
    html = Path(report.report_workdir(tmp_path, {"name": "<run>", "step": 7})).read_text()
    assert "&lt;run&gt;" in html and "<run>" not in html
    assert "&lt;b&gt;green&lt;/b&gt;" in html and "<b>green</b>" not in html
    assert html.count('<li class="card') == 12
    assert html.count("\u2717 wrong</span></p>") == 4
    assert "Accuracy over resolution" in html and "Training loss" in html and "chance 25%" in html
    # nothing is fetched: every address is inside the file
    assert not re.findall(r'(?:src|href)="(?!data:)', html) and "url(" not in html


def test_several_evaluations_of_one_workdir_lose_no_results(tmp_path):
    """As when each of several GPUs asks another benchmark."""

    def merge(one):
        for i in range(8):
            results.merge_results(tmp_path / "results.json", {f"{one}_{i}": {}})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(merge, "abcd"))
    found = results.read_results(tmp_path / "results.json")
    assert sorted(found) == [f"{one}_{i}" for one in "abcd" for i in range(8)]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_questions_without_an_answer_among_others_are_asked_and_not_counted(tmp_path):
    known, unknown = record(0, "Which?", "red"), record(1, "Whose?", "?")
    unknown = dataclasses.replace(
        unknown, messages=unknown.messages[:1], meta={"id": "r1", "unscored": True}
    )
    say = lambda records, *_: ["red"] * len(records)  # noqa: E731
    tasks = [vqa("t", [known, unknown])]
    found = runner.evaluate(tasks, say, workdir=tmp_path, progress=False)["t"]["test"]
    assert (found["n"], found["accuracy"]) == (1, 1.0)
    html = Path(report.report_workdir(tmp_path)).read_text()
    assert html.count('<li class="card') == 2 and '<span class="verdict">not scored' in html


def test_an_interruption_tells_what_is_kept(tmp_path):
    console = Console(file=io.StringIO(), width=300)
    tasks = [vqa(name, colours()) for name in ("first", "second", "third")]
    asked = []

    def say(records, *_):
        asked.append(records)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ["red"] * len(records)

    with pytest.raises(KeyboardInterrupt):
        runner.evaluate(tasks, say, workdir=tmp_path, console=console)
    assert f"first, second: finished, kept in {tmp_path}; started again" in console.file.getvalue()
    assert list(results.read_results(tmp_path / "results.json")) == ["first", "second"]


def test_results_merge_and_name_the_split(tmp_path):
    run([vqa("a", colours(), split="val")], tmp_path)
    run([vqa("b", colours())], tmp_path)
    kept = results.read_results(tmp_path / "results.json")
    assert {t: list(e) for t, e in kept.items()} == {"a": ["val"], "b": ["test"]}
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(MMJaxError, match=r"results\.json is no JSON"):
        run([vqa("b", colours())], tmp_path)


def test_multiple_choice_chance_prompt_and_limit():
    options = [record(i, "Which? A. x B. y", "AB"[i % 2], choices=["x", "y"]) for i in range(10)]
    asked = []

    def say(records, resolution, max_new_tokens):
        asked.extend(question_of(r) for r in records)
        return ["A man"] * (len(records) - 1) + ["B."]

    task = multiple_choice("mc", options, prompt="{question} Letter only.")
    found = runner.evaluate([task], say, limit=4, progress=False)["mc"]["test"]
    assert (found["n"], found["correct"], found["chance"]) == (4, 1, 0.5)
    assert asked == ["Which? A. x B. y Letter only."] * 4
    # Of many it is that of questions from all over the source, which may be sorted.
    more = [record(1, "Which?", "A", choices=["x", "y", "z", "v"])] * 1000
    task = multiple_choice("mc", options * 100 + more)
    found = runner.evaluate([task], lambda r, *_: ["A"] * len(r), progress=False)["mc"]["test"]
    assert (found["n"], found["chance"]) == (2000, 0.375)


def test_a_right_answer_that_is_no_option_is_counted_and_told(tmp_path):
    options = [record(i, "Which?", answer, choices=["x", "y"]) for i, answer in enumerate("BzA")]
    task = multiple_choice("mc", options, train=options)
    say = lambda records, *_: ["B"] * len(records)  # noqa: E731
    found = runner.evaluate([task], say, workdir=tmp_path, progress=False)["mc"]["test"]
    assert (found["n"], found["correct"], found["unreadable"]) == (3, 1, 1)
    assert found["blind"]["majority"]["n"] == 3
    row = json.loads((tmp_path / "predictions" / "mc.jsonl").read_text().splitlines()[1])
    assert row["prediction"] == "B" and "['z'] is a letter or a text" in row["error"]


def test_options_may_be_numbers():
    options = [record(i, "How many?", answer, choices=[3, 7]) for i, answer in enumerate("7A")]
    task = multiple_choice("mc", options, scorer="multiple_choice_text")
    found = runner.evaluate([task], lambda records, *_: ["7", "B"], progress=False)["mc"]["test"]
    assert (found["n"], found["correct"]) == (2, 1) and "unreadable" not in found
    wrong = [record(0, "How many?", "A", choices="AB")]
    with pytest.raises(MMJaxError, match="record r0 of .* choices are 'AB'; give a list"):
        run([multiple_choice("mc", wrong)], need_some=True)


class Broken(list):
    """A source of numbered records, two of which cannot be read."""

    def __getitem__(self, i):
        if i in (0, 40):
            raise BadSample("corrupt_image", "x.png is cut off", {"id": f"own{i}"})
        return record(i, "Q?", "red")


def test_what_cannot_be_asked_is_listed_by_its_own_id(tmp_path):
    """By its number it had the id of another question, where ids are numbers."""
    bare = dataclasses.replace(record(1, "Q?", "red"), messages=record(1, "Q?", "red").messages[:1])
    bare = dataclasses.replace(bare, meta={"id": "bare"})
    run([vqa("t", [bare, record(2, "Q?", "red")])], str(tmp_path))
    run([vqa("u", Broken(range(2)))], str(tmp_path))
    for name, wanted in (("t", "bare"), ("u", "own0")):
        rows = (tmp_path / "predictions" / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(rows[0])["id"] == wanted and "error" in json.loads(rows[0])


def test_an_unreadable_record_counts_as_wrong():
    """In training records and solved examples it is passed over."""
    task = vqa("t", Broken(range(50)), train=Broken(range(3)), demos=Broken(range(4)), shots=2)
    found = run([task])["t"]["test"]
    assert (found["n"], found["correct"], found["unreadable"]) == (50, 48, 2)
    assert found["blind"]["majority"]["correct"] == 48
    sweep = run([vqa("t", Broken(range(3)), resolutions=(None, 5))])["t"]
    assert [entry["unreadable"] for entry in sweep.values()] == [1, 1]


def test_a_record_without_answers_ends_no_evaluation():
    """Met after hours it would take all answers before it along."""
    rows = [record(i, "Q?", "red") for i in range(3)]
    rows[2] = dataclasses.replace(rows[2], messages=rows[2].messages[:1], meta={"id": "r2"})
    found = run([vqa("t", rows)])["t"]["test"]
    assert (found["n"], found["correct"], found["unreadable"]) == (3, 2, 1)
    assert answers_of(record(5, "Q?", "red", answers=5)) == ["5"]
    rows[0].meta["choices"] = "red, blue"
    task = multiple_choice("t", rows, scorer="exact_match", train=rows, chance=0.5)
    found = run([task])["t"]["test"]
    assert (found["n"], found["correct"], found["unreadable"]) == (3, 1, 2)
    assert found["blind"]["majority"] == found["blind"]["majority"] | {"n": 3, "answer": "red"}
    choice = run([multiple_choice("t", rows)])["t"]["test"]
    assert choice["unreadable"] == 3 and "chance" not in choice
    few = [record(i, "Q?", "red") for i in range(3)]
    few[0].meta["answers"] = ["red"] * 10
    found = run([vqa("t", few, scorer="vqa_accuracy")])["t"]["test"]
    assert found["unreadable"] == 2 and found["correct"] == 0  # "RED", and all humans agree


def test_a_record_without_a_question_ends_no_evaluation():
    rows = [record(i, "Q?", "red") for i in range(3)]
    rows[1] = dataclasses.replace(rows[1], messages=rows[1].messages[1:])
    found = run([vqa("t", rows, prompt="{question} One word.")])["t"]["test"]
    assert (found["n"], found["correct"], found["unreadable"]) == (3, 2, 1)


def test_where_nothing_can_be_asked_there_is_no_result(tmp_path):
    """As with a wrong folder of pictures: 0 % would look like one."""
    say = lambda records, *_: [BadSample("missing_image", "/no/a.png: no such")] * len(records)  # noqa: E731
    tasks, options = [vqa("t", colours())], dict(progress=False)
    said = "task t: none of its 6 questions could be asked: /no/a.png: no such"
    with pytest.raises(MMJaxError, match=said):
        runner.evaluate(tasks, say, workdir=tmp_path, need_some=True, **options)
    assert not list(tmp_path.iterdir())
    assert runner.evaluate(tasks, say, **options)["t"]["test"]["unreadable"] == 6  # while training


def test_a_picture_that_is_not_there_counts_as_wrong_and_is_told(tmp_path):
    class Model:
        class processor:
            def encode(segments, images, max_tokens):
                assert max_tokens == 65  # 16 are left for an answer
                return {"picture": open_image(images[0])}

            def decode(tokens, scale):
                assert scale == 0.5
                return tokens

        def coordinate_scale(images):
            return 0.5

        def longest_prompt(new):
            return 81 - new

        def generate_tokens(examples, **options):
            return [" red "] * len(examples)

    there, lost = record(0, "Q?", "red"), record(1, "Q?", "red")
    lost = dataclasses.replace(lost, images=("/nowhere/a.png",))
    generate = Answerer(Model, template="fuyu_prompt", batch_size=2)
    for resolutions in ((None,), (6,)):
        task = vqa("t", [lost, there], resolutions=resolutions)
        got = runner.evaluate([task], generate, workdir=tmp_path, progress=False)
        (found,) = got["t"].values()
        assert (found["n"], found["correct"], found["unreadable"]) == (2, 1, 1)
        rows = predictions.read_predictions(predictions.predictions_path(tmp_path, "t"))
        assert "/nowhere/a.png" in rows[0]["error"] and rows[0]["prediction"] == ""
        assert "error" not in rows[1] and rows[1]["prediction"] == "red"
    assert "1 / 2, 1 unreadable" in Path(report.report_workdir(tmp_path)).read_text()
    console = Console(file=io.StringIO(), width=160)
    console.print(results_table(got))
    assert "1 / 2, 1 unreadable" in console.file.getvalue()


def test_names_are_shown_as_they_stand_and_whole():
    """Brackets would be rich's markup, and a narrow log would cut names off."""
    names = ["[/]", "a[red]b"]
    rows = [record(i, "Q?", "red", group=name) for i, name in enumerate(names)]
    task = "a_task_with_a_name_that_is_long_" * 2 + "[end]"
    console = Console(file=io.StringIO(), width=160)
    console.print(results_table(run([vqa(task, rows)])))
    shown = console.file.getvalue()
    assert task in shown and all(name in shown for name in names)


def test_half_a_surrogate_pair_ends_no_evaluation(tmp_path):
    """JSON may hold one as an escape; no encoding has it."""
    odd = record(0, "Which \ud83d?", "red", group="\ud83d")
    run([vqa("t", [odd], group="group")], tmp_path)
    (row,) = predictions.read_predictions(predictions.predictions_path(tmp_path, "t"))
    assert row["question"] == "Which \ud83d?" and row["correct"]
    assert list(results.read_results(tmp_path / "results.json")["t"]["test"]["groups"]) == [
        "\ud83d"
    ]
    assert "Which \\ud83d?" in Path(report.report_workdir(tmp_path)).read_text("utf-8")


def test_stop_leaves_the_unfinished_task_out(tmp_path):
    calls = iter([False, True])
    tasks = [vqa("a", colours()), vqa("b", colours())]
    assert list(run(tasks, tmp_path, stop=lambda: next(calls))) == ["a"]
    assert list(results.read_results(tmp_path / "results.json")) == ["a"]


def test_task_settings_are_checked():
    made = make_task({"name": "t", "source": {"kind": "magnifier"}, "resolutions": (None, 24)})
    assert made == Task("t", {"kind": "magnifier"}, resolutions=(None, 24))
    with pytest.raises(MMJaxError, match="did you mean 'scorer'"):
        make_task({"name": "t", "source": (), "score": "x"})
    for wrong, told in (
        (dict(source=None), "source is None; describe a source"),  # ended in a TypeError
        (dict(train="train.json"), "train is 'train.json'; describe a source"),
        (dict(shots=-1, demos=()), "shots is -1; give at least 0"),  # ended within itertools
        (dict(train_limit=0), "train_limit is 0; give at least 1"),
        (dict(resolutions=(0,)), "0 is not a number of pixels"),  # asked at one pixel
        (dict(resolutions=(None, -24)), "-24 is not a number of pixels"),
        (dict(chance=25.0), "chance is 25.0; it is a share, from 0 to 1"),
    ):
        with pytest.raises(MMJaxError, match=f"task t: .*{told}"):
            make_task({"name": "t", "source": (), **wrong})
    for name in (["pope"], "popes"):  # what no table has as a key, too
        with pytest.raises(MMJaxError, match=r"config.eval.tasks.benchmark is .*there are "):
            make_task({"benchmark": name})
    with pytest.raises(MMJaxError, match="different names"):
        run([vqa("a", colours()), vqa("a", colours())])
    with pytest.raises(MMJaxError, match="different files, got a b, a_b"):
        run([vqa("a b", colours()), vqa("a_b", colours())])
    caption = Record((Message("assistant", "A cat."),), (), {"id": "c"})
    with pytest.raises(MMJaxError, match="task t: record c has no question for the prompt"):
        run([vqa("t", [caption], prompt="Say: {question}")], need_some=True)
    with pytest.raises(MMJaxError, match="task t: limit is 0; give at least 1"):
        vqa("t", colours(), limit=0)
    with pytest.raises(MMJaxError, match="holds no records"):
        run([vqa("a", [])])


def test_the_plain_accuracy_is_that_of_the_largest_size_whatever_the_order():
    entries = {str(n): {"longest_side": n, "accuracy": n / 10} for n in (5, 8, 6)}
    assert runner.as_metrics({"t": entries})["eval/t/accuracy"] == 0.8


def test_fractional_scores_are_summed_as_they_are():
    found = results.summarise([{"score": 0.9}, {"score": 1.0}, {"score": 0.3}])
    assert (found["correct"], found["accuracy"]) == (2.2, 0.733333)


def test_wilson_interval_and_spread():
    assert results.wilson(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-4)
    assert results.wilson(0, 0) == (0.0, 1.0)
    assert results.wilson(10, 10)[1] == pytest.approx(1.0)
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, None) == [0, 1, 2]


def test_the_table_has_no_column_of_nothing():
    def titles(**options):
        made = results_table(run([vqa("a", colours(), **options)]))
        return [column.header for column in made.columns]

    assert titles() == ["task", "at", "accuracy", "95 %", "correct"]
    assert titles(chance=0.5)[-1] == "chance"
    assert titles(train=colours())[-1] == "question only"


def test_a_file_that_finds_no_room_leaves_the_old_one_alone(tmp_path):
    results.write_atomic(tmp_path / "a.json", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            results.write_atomic(tmp_path / "a.json", "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_large_counts_keep_their_digits():
    assert results.right_of({"correct": 1_234_567, "n": 2_000_000}) == "1,234,567 / 2,000,000"
    assert results.right_of({"correct": 130_456.3333, "n": 214_354}) == "130,456.3 / 214,354"


def test_more_than_four_tasks_differ_in_a_chart():
    series = [charts.Series(str(i), [charts.Point(i, 1.0, "")]) for i in range(16)]
    marks = re.findall(r"<svg[^>]*>(.*?)</svg>", charts.legend(series))
    assert len(marks) == 16 == len(set(marks))


def test_a_report_of_nothing_is_a_page(tmp_path):
    html = Path(report.report_workdir(tmp_path)).read_text()
    assert "Nothing has been evaluated yet" in html
