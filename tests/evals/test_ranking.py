"""Options ranked by their likelihood: what stands for an answer, and how likely each is."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.data.templates import get_template
from mmjax.evals import compare, predictions, results, runner
from mmjax.evals.answer import Answerer
from mmjax.evals.tasks import Task, make_task, multiple_choice, vqa
from mmjax.generate.loop import pad_batch
from mmjax.loaded import LoadedModel
from mmjax.models.fuyu.processor import FuyuProcessor
from mmjax.parallel.mesh import use
from mmjax.types import BadSample, Message, MMJaxError, Record
from tests import tiny

QUESTIONS = ("Which is it?", "What colour?", "Is it day?")


def record(i, answer="B", **meta):
    picture = np.full((9, 12, 3), 20 * i, np.uint8)
    messages = (Message("user", QUESTIONS[i % 3]), Message("assistant", answer))
    return Record(messages, (picture,), {"id": f"r{i}", "answers": [answer], **meta})


class Likelihoods:
    """Ranks from a table, option -> likelihood, and keeps what it was asked."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def __call__(self, *_):
        raise AssertionError("nothing is written")

    def rank(self, records, options, resolution, *, mean):
        self.asked.append((len(records), resolution, mean))
        return [
            BadSample("no", "no such picture")
            if r.meta["id"] == "r9"
            else [self.table[o] for o in x]
            for r, x in zip(records, options, strict=True)
        ]


def run(task, answers, tmp_path, **options):
    got = runner.evaluate([task], answers, workdir=tmp_path, progress=False, **options)
    rows = predictions.read_predictions(predictions.predictions_path(tmp_path, task.name))
    return got[task.name], rows


def test_the_likeliest_of_a_records_options_is_its_letter(tmp_path):
    records = [record(i, "B", choices=["cat", "dog", "bird"]) for i in (0, 1, 9)]
    says = Likelihoods({"cat": -3.0, "dog": -2.0, "bird": -2.0})  # the first of two that are alike
    task = multiple_choice("t", records, rank="likelihood", resolutions=(None, 6))
    got, rows = run(task, says, tmp_path)
    assert [row["prediction"] for row in rows] == ["B", "B", ""] * 2
    assert rows[0]["likelihoods"] == [-3.0, -2.0, -2.0] and "likelihoods" not in rows[2]
    assert rows[2]["error"] == "no such picture"
    assert {key: (x["correct"], x["n"], x["rank"]) for key, x in got.items()} == {
        "full": (2, 3, "likelihood"), "6": (2, 3, "likelihood")
    }  # fmt: skip
    assert says.asked == [(3, None, False), (3, 6, False)]


def test_a_tasks_own_options_are_texts_and_a_mean_is_asked_for(tmp_path):
    records = [record(0, "yes"), record(1, "no")]
    task = vqa("t", records, rank="mean_likelihood", options=("no", "yes"))
    got, rows = run(task, says := Likelihoods({"no": -0.5, "yes": -0.7}), tmp_path)
    assert [row["prediction"] for row in rows] == ["no", "no"] and got["test"]["correct"] == 1
    assert got["test"]["options"] == ["no", "yes"] and says.asked == [(2, None, True)]


def test_results_of_ranked_and_written_answers_are_not_compared(tmp_path):
    records = [record(0, choices=["a cat", "B"])]
    for name, rank in (("ranked", "likelihood"), ("written", None)):
        answers = Likelihoods({"a cat": -1.0, "B": -2.0}) if rank else lambda *_: ["B"]
        run(multiple_choice("t", records, rank=rank), answers, tmp_path / name)
    with pytest.raises(MMJaxError, match="rank is likelihood in 'ranked' and None in 'written'"):
        compare.read_runs([f"{name}={tmp_path / name}" for name in ("ranked", "written")])
    assert results.read_results(tmp_path / "ranked/results.json")["t"]["test"]["accuracy"] == 0


class ByOrder:
    """Ranks by the pictures of the examples: the first counts ten times the second."""

    def rank(self, records, options, resolution, *, mean):
        assert len(records) == len(options)
        levels = [[int(p[0, 0, 0]) // 20 for p in r.images] for r in records]
        if any(9 in of_one for of_one in levels):
            return [BadSample("no", "no such picture") for _ in records]
        return [[-float(a * 10 + b), -20.0] for a, b, *_ in levels]


def test_options_are_ranked_by_their_mean_over_the_orders_of_the_examples(tmp_path):
    def asked(shown, **more):
        demos = [dataclasses.replace(record(i, "yes"), meta={"answers": ["yes"]}) for i in shown]
        task = vqa("t", [record(5, "no")], rank="likelihood", options=("no", "yes"), shots=2,
                   demos=demos, **more)  # fmt: skip
        return run(task, ByOrder(), tmp_path / str(len(more)))

    # A third record must be there to draw from; it is like the second.
    once, rows = asked((1, 3, 3))
    first = rows[0]["likelihoods"]
    assert first[0] in (-13, -31, -33) and "orders" not in once["test"]
    each, rows = asked((1, 3, 3), orders=6)  # of two examples there are two
    mean = {-13: -22, -31: -22, -33: -33}[first[0]]
    assert rows[0]["likelihoods"] == [mean, -20.0] and rows[0]["prediction"] == "yes"
    assert each["test"]["orders"] == 6
    with pytest.raises(MMJaxError, match="orders is None in '0' and 6 in '1'"):
        compare.read_runs([f"{n}={tmp_path / n}" for n in ("0", "1")])
    assert asked((9, 9, 9), orders=2)[1][0]["error"] == "no such picture"


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(options=("a", "b")), r"options \('a', 'b'\) with rank None; give two or more"),
        (dict(rank="likelihood", options=("a", "a")), "give two or more different texts"),
        (dict(rank="likelihood", cut="first_line"), "leave cut out"),
        (dict(rank="likely"), "likelihood"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    given = {"name": "t", "source": [record(0)], **settings}
    with pytest.raises(MMJaxError, match=says):
        make_task(given)


def test_records_without_options_and_answerers_that_rank_nothing_are_told(tmp_path):
    records = [record(0), record(1, choices=["x", "<image>"]), record(2, choices=["cat", "B"])]
    task = multiple_choice("t", records, rank="likelihood")
    _, rows = run(task, Likelihoods({"cat": 0.0, "B": -1.0}), tmp_path)
    assert "record r0 has the options []" in rows[0]["error"] and rows[2]["prediction"] == "A"
    assert "<image>" in rows[1]["error"]
    with pytest.raises(MMJaxError, match="what answers it has no method rank"):
        run(task, lambda *_: [], tmp_path)
    nan = Likelihoods({"cat": float("nan"), "B": float("nan")})
    with pytest.raises(MMJaxError, match="are no numbers"):
        run(task, nan, tmp_path)


@pytest.fixture(scope="module")
def model():
    words = [*" ".join(QUESTIONS).split(), "yes", "no", "a", "very", "red", "bird"]
    processor = FuyuProcessor.for_words(words, tiny.CONFIG)
    ids = processor.token_ids()
    decoder = dataclasses.replace(tiny.CONFIG.decoder, vocab_size=ids["vocab_size"])
    config = dataclasses.replace(
        tiny.CONFIG,
        decoder=decoder,
        image_token_id=ids["image_token_id"],
        eos_token_id=ids["eos_token_id"],
    )
    with use() as mesh:
        return LoadedModel("fuyu", config, tiny.model(config), processor, mesh)


def test_an_option_is_as_likely_as_training_finds_it(model):
    """Minus the loss of the record with the option for its answer, but for the end token."""
    options = ["yes", "a very red bird", "no"]
    asked = [record(i, "?") for i in range(3)]
    found = Answerer(model, "fuyu_prompt", batch_size=4).rank(asked, [options] * 3, None)
    means = Answerer(model, "fuyu_prompt", batch_size=4).rank(asked, [options] * 3, None, mean=True)
    graphdef, params = nnx.split(model.model)
    for one, sums, mean in zip(asked, found, means, strict=True):
        for option, value, each in zip(options, sums, mean, strict=True):
            told = dataclasses.replace(
                one, messages=(one.messages[0], Message("assistant", option))
            )
            example = model.processor.encode(get_template("fuyu_chat")(told), told.images)
            batch, _ = pad_batch([example])
            at = np.flatnonzero(example["loss_mask"])[:-1]
            rows = np.float64(log_p(graphdef, params, batch)[0])
            want = rows[at - 1, example["tokens"][at]].sum()
            np.testing.assert_allclose(value, want, atol=1e-4)
            np.testing.assert_allclose(each, want / len(at), atol=1e-4)


def test_an_option_begins_as_answers_do_and_examples_before_it_do_not_count():
    """Otter's template puts a space before an answer."""
    turns = ("user", "<image>Q?"), ("assistant", "old"), ("user", "Q2?"), ("assistant", "right")
    messages = tuple(Message(*turn) for turn in turns)
    asked = dataclasses.replace(record(0), messages=messages)
    seen = []

    class Model:
        class processor:
            def encode(segments, images, max_tokens, patches):
                seen.append(segments)
                raise BadSample("seen", "enough")

        def longest_prompt(new):
            return None

        def log_likelihoods(asked, **_):
            return []

    for template, want in (("otter_prompt", " new"), ("guanaco_prompt", "new")):
        Answerer(Model, template, batch_size=4).rank([asked], [["new", "other"]], None)
        segments = seen.pop()
        assert [s.value for s in segments if s.loss] == [want] and segments[-1].loss
        assert not any("right" in str(s.value) for s in segments)
    with pytest.raises(MMJaxError, match="template 'plain' does not say how an answer stands"):
        Answerer(Model, "plain", batch_size=4).rank([asked], [["new", "other"]], None)


def test_pictures_are_read_for_one_of_the_options(model, monkeypatch):
    read, cut = [], FuyuProcessor._patches
    count = lambda self, plans: read.append(len(plans)) or cut(self, plans)  # noqa: E731
    monkeypatch.setattr(FuyuProcessor, "_patches", count)
    options = ["yes", "no", "a very red bird"]
    Answerer(model, "fuyu_prompt", batch_size=4).rank([record(0), record(1)], [options] * 2, None)
    assert read == [1, 1]


def test_pictures_that_cannot_be_read_are_left_to_their_record(model):
    lost = dataclasses.replace(record(0), images=(b"none",))
    options = [["yes", "no"]] * 2
    bad, good = Answerer(model, "fuyu_prompt", batch_size=4).rank([lost, record(1)], options, None)
    assert isinstance(bad, BadSample) and len(good) == 2
    task = Task("t", [lost, record(1, "no")], rank="likelihood", options=("yes", "no"))
    answers = Answerer(model, "fuyu_prompt", batch_size=4)
    entry = runner.evaluate([task], answers, progress=False)["t"]["test"]
    assert entry["unreadable"] == 1 and entry["n"] == 2


@partial(jax.jit, static_argnums=0)
def log_p(graphdef, params, batch):
    model = nnx.merge(graphdef, params)
    return jax.nn.log_softmax(model.logits(model(batch)))
