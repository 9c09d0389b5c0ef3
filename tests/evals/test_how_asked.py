"""What results.json keeps of how a task was asked, cuts by name, and tasks from a file."""

import json
from pathlib import Path

import pytest

from mmjax.evals import compare, cuts, predictions, report, runner
from mmjax.evals.benchmarks import BENCHMARKS
from mmjax.evals.scorers import READERS
from mmjax.evals.tasks import Task, ask, make_task, question_of
from mmjax.generate.beam import Beams
from mmjax.train.settings import EvalSettings, RunSettings
from mmjax.train.tasks import beams_of, check_tasks, with_tasks
from mmjax.types import Message, MMJaxError, Record


def records(count=4):
    return [
        Record((Message("user", f"What {i}?"),), (), {"id": f"r{i}", "answers": ["cat"]})
        for i in range(count)
    ]


def say(records, *_):
    return ["cat Question:And"] * len(records)


def test_results_say_how_a_task_was_asked(tmp_path):
    task = Task("t", records(), prompt="{question}\n<b>", cut="open_flamingo_vqa", limit=3)
    asked = {"template": "bunny_prompt", "num_beams": 3, "length_penalty": 0.0}
    found = runner.evaluate([task], say, workdir=tmp_path, progress=False, limit=2, asked=asked)
    entry = json.loads((tmp_path / "results.json").read_text())["t"]["test"]
    assert entry == found["t"]["test"]
    told = {"prompt": "{question}\n<b>", "cut": "open_flamingo_vqa", "max_new_tokens": 16}
    told |= {"limit": 2, "scorer": "exact_match", "summary": None} | asked
    assert {key: entry[key] for key in told} == told
    rows = predictions.read_predictions(tmp_path / "predictions/t.jsonl")
    assert [(r["prediction"], r["generated"], r["score"]) for r in rows] == 2 * [
        ("cat", "cat Question:And", 1.0)
    ]
    html = Path(report.report_workdir(tmp_path)).read_text()
    assert "How it was asked" in html and "<dt>beams</dt><dd>3</dd>" in html
    # Line ends stand in the file, and a browser is told to keep them: options are lines.
    assert "{question}\n&lt;b&gt;" in html
    assert ".card p,.card dd,.meta dd{white-space:pre-line}" in html


def test_results_of_several_checkpoints_in_one_workdir_are_told_apart(tmp_path):
    def asked(name, checkpoint, step):
        task = Task(name, records())
        facts = {"checkpoint": checkpoint}
        runner.evaluate([task], say, workdir=tmp_path, progress=False, step=step, asked=facts)
        meta = {"checkpoint": checkpoint, "step": step, "parameters": "12,345"}
        return Path(report.report_workdir(tmp_path, meta)).read_text().split("</dl>")

    header, one, *_ = asked("one", "runs/a", 10)
    assert "<dd>runs/a</dd>" in header and "<dd>12,345</dd>" in header
    header, one, two, *_ = asked("two", "runs/b", None)
    assert "runs/b" not in header and "12,345" not in header and "several" in header
    assert "<dd>runs/a</dd>" in one and "<dd>10</dd>" in one
    assert "<dd>runs/b</dd>" in two
    header, *_ = asked("one", "runs/b", None)  # asked anew: all are of one again
    assert "<dd>runs/b</dd>" in header


def test_the_prompt_is_put_around_the_last_question():
    turns = (("user", "<image>First?"), ("assistant", "a"), ("user", "Last?"))
    asked = ask(
        Task("t", (), prompt="{question} Briefly."), Record(tuple(Message(*t) for t in turns))
    )
    assert [m.text for m in asked.messages] == ["<image>First?", "a", "Last? Briefly."]
    assert question_of(asked) == "Last? Briefly."


def test_nothing_is_cut_unless_it_is_asked_for():
    found = runner.evaluate([Task("t", records())], say, progress=False)["t"]["test"]
    assert found["correct"] == 0


@pytest.mark.parametrize(
    ("name", "text", "kept"),
    [
        ("open_flamingo_vqa", "two Question:How", "two"),
        ("open_flamingo_vqa", "red, white Short answer:no", "red"),
        ("open_flamingo_vqa", "1,000", "1,000"),
        ("open_flamingo_vqa", "an Answering machine", "an"),
        ("open_flamingo_caption", 'a "big" cat Output:a dog', "a big cat"),
        ("first_line", "\nyes\nno", "yes"),
    ],
)
def test_cuts_by_hand(name, text, kept):
    """After postprocess_vqa_generation and postprocess_captioning_generation of OpenFlamingo."""
    assert cuts.get_cut(name)(text) == kept


def test_runs_that_were_asked_otherwise_are_not_compared(tmp_path):
    for name, changes in (("a", {}), ("b", {"prompt": "{question}!"}), ("c", {})):
        task = Task("t", records(), **changes)
        asked = {"template": f"{name}_prompt"}
        runner.evaluate([task], say, workdir=tmp_path / name, progress=False, asked=asked)
    a, b, c = (str(tmp_path / name) for name in "abc")
    with pytest.raises(MMJaxError, match="prompt is None in 'a' and {question}! in 'b'"):
        compare.read_runs([a, b])
    assert "Templates: a a_prompt, c c_prompt." in compare.table(compare.read_runs([a, c]))


def test_tasks_from_a_file(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text('[{"name": "t", "source": {"kind": "sums"}, "resolutions": [null, 24]}]')
    chosen = with_tasks(RunSettings(), path).eval
    assert chosen.tasks[0]["resolutions"] == (None, 24)
    path.write_text('{"name": "t", "source": {"kind": "sums"}, "options": ["1", "2"]}')
    ranked = {"rank": "likelihood"} | with_tasks(RunSettings(), path).eval.tasks[0]
    assert make_task(ranked).options == ("1", "2")
    path.write_text('{"benchmark": "pope"}')
    with pytest.raises(MMJaxError, match="benchmark 'pope' needs path and images"):
        check_tasks(with_tasks(RunSettings(), path))
    path.write_text('["pope"]')
    with pytest.raises(MMJaxError, match="expected a list of tasks"):
        with_tasks(RunSettings(), path)


def test_mistakes_are_named_before_a_model_is_loaded():
    with pytest.raises(MMJaxError, match="unknown cut 'openflamingo_vqa'; did you mean 'open_fl"):
        Task("t", records(), cut="openflamingo_vqa")
    with pytest.raises(MMJaxError, match="unknown submission 'vqa2'; did you mean 'vqa'"):
        Task("t", records(), submission="vqa2")
    with pytest.raises(MMJaxError, match="num_beams is 0; give a whole number from 1 up"):
        check_tasks(RunSettings(eval=EvalSettings(num_beams=0)))


def test_beams_are_those_of_the_settings():
    assert beams_of(EvalSettings(num_beams=3, length_penalty=0.0)) == Beams(3, 0.0)


def test_the_page_has_every_name():
    page = Path(__file__).parents[2].joinpath("docs/evaluation.md").read_text()
    for known in (BENCHMARKS, cuts.CUTS, READERS):
        assert [name for name in known if f"`{name}`" not in page] == []
