"""Few-shot questions: which examples stand before a question, and how."""

import dataclasses
import tracemalloc

import pytest

from mmjax.evals.few_shot import Demonstrations, demonstrations, join
from mmjax.evals.predictions import predictions_path, read_predictions
from mmjax.evals.runner import evaluate
from mmjax.evals.tasks import Task, ask
from mmjax.types import BadSample, Message, MMJaxError, Record


def solved(i, marked=True):
    mark = "<image>" if marked else ""
    messages = (Message("user", f"{mark}What is {i}?"), Message("assistant", f"a{i}"))
    return Record(messages, (f"picture {i}",), {"id": f"r{i}", "answers": [f"a{i}"]})


POOL = [solved(i) for i in range(20)]


def test_examples_come_first_each_with_its_picture():
    asked = Demonstrations(POOL, 2).before(solved(99), 5)
    assert [m.role for m in asked.messages] == ["user", "assistant"] * 3
    numbers = [int(m.text[1:]) for m in asked.messages if m.role == "assistant"]
    assert numbers[-1] == 99 and asked.meta["id"] == "r99"
    assert list(asked.images) == [f"picture {n}" for n in numbers]


def test_examples_are_a_function_of_the_question_and_never_itself():
    demos = Demonstrations(POOL, 3)
    drawn = {i: demos.before(POOL[i], i).images for i in range(20)}
    assert drawn == {i: demos.before(POOL[i], i).images for i in range(20)}
    assert len(set(drawn.values())) > 15
    assert all(len(set(images)) == 4 for images in drawn.values())
    other = Demonstrations(POOL, 3, seed=1)
    assert other.before(POOL[0], 0).images != drawn[0]
    fewer = Demonstrations(POOL, 2)  # more shots stand behind those, before the question
    assert all(fewer.before(POOL[i], i).images[:2] == drawn[i][:2] for i in range(20))
    nameless = [dataclasses.replace(r, meta={"answers": ["a"]}) for r in POOL]
    assert len(Demonstrations(nameless, 3).before(nameless[0], 0).images) == 4
    # Records without ids that are asked and shown alike: an index alone tells them apart.
    task = Task("t", nameless, shots=19, demos=nameless)
    for i, record in enumerate(nameless):
        shown = demonstrations(task).before(ask(task, record), i).images
        assert sorted(shown) == sorted(r.images[0] for r in nameless)


def test_a_small_pool_is_drawn_once_for_all():
    demos = Demonstrations(POOL, 2, pool=4)
    seen = {image for i in range(20) for image in demos.before(solved(99), i).images[:-1]}
    assert len(seen) == 4
    other = Demonstrations(POOL, 2, pool=4, seed=1)
    assert {image for i in range(20) for image in other.before(solved(99), i).images[:-1]} != seen
    # One smaller than the shots is as large as it has to be, for a question within it too.
    least = Demonstrations(POOL, 3, pool=1)
    assert {len(least.before(record, 0).images) for record in POOL} == {4}


def test_examples_without_pictures_and_pictures_without_marks():
    asked = Demonstrations(POOL, 2, text_only=True).before(solved(99), 0)
    assert asked.images == ("picture 99",)
    assert [m.text.count("<image>") for m in asked.messages if m.role == "user"] == [0, 0, 1]
    joined = join([solved(1, marked=False), solved(2, marked=False)])
    assert [m.text for m in joined.messages if m.role == "user"] == [
        "<image>What is 1?", "<image>What is 2?"
    ]  # fmt: skip
    told = dataclasses.replace(
        solved(1, marked=False), messages=(Message("system", "Look."), Message("user", "What?"))
    )
    assert [m.text for m in join([told]).messages] == ["Look.", "<image>What?"]
    both = dataclasses.replace(told, images=("one", "two"))
    assert [m.text for m in join([both]).messages] == ["Look.", "<image><image>What?"]
    said = dataclasses.replace(told, messages=(Message("assistant", "A cat."),))
    asked = [(m.role, m.text) for m in join([said]).messages]
    assert asked == [("user", "<image>"), ("assistant", "A cat.")]
    blind = dataclasses.replace(said, images=())
    assert join([blind]).messages == blind.messages


def test_a_task_asks_with_shots_and_says_so(tmp_path):
    seen = []

    def answer(records, resolution, max_new_tokens):
        seen.extend(records)
        return [r.meta["answers"][0] for r in records]

    task = Task("few", [solved(i) for i in range(30, 33)], shots=4, demos=POOL)
    results = evaluate([task], answer, progress=False, workdir=tmp_path)["few"]["test"]
    assert results["accuracy"] == 1.0 and results["shots"] == 4
    assert [len(r.images) for r in seen] == [5, 5, 5]
    for row, r in zip(read_predictions(predictions_path(tmp_path, "few")), seen, strict=True):
        assert row["examples"] == [f"r{image.split()[-1]}" for image in r.images[:-1]]
    seen.clear()
    blind = Task("few", [solved(30)], text_shots=1, demos=POOL)
    assert evaluate([blind], answer, progress=False)["few"]["test"]["text_shots"] == 1
    assert [(len(r.images), len(r.messages)) for r in seen] == [(1, 4)]


def test_examples_are_asked_like_the_question():
    seen = []

    def answer(records, resolution, max_new_tokens):
        seen.extend(records)
        return [""] * len(records)

    prompt = "{question} Answer with one word."
    task = Task("few", [solved(30)], shots=2, demos=POOL, prompt=prompt)
    evaluate([task], answer, progress=False)
    asked = [m.text for m in seen[0].messages if m.role == "user"]
    assert len(asked) == 3 and all(text.endswith("? Answer with one word.") for text in asked)


def test_an_example_without_an_answering_turn_shows_its_first_right_answer():
    meta = [r.meta | {"answers": [*r.meta["answers"], "another"]} for r in POOL]
    bare = [
        dataclasses.replace(r, messages=r.messages[:1], meta=m)
        for r, m in zip(POOL, meta, strict=True)
    ]
    asked = Demonstrations(bare, 2).before(solved(99), 5)
    assert asked == Demonstrations(POOL, 2).before(solved(99), 5)
    untold = [dataclasses.replace(r, meta={"id": "r3"}) for r in bare]
    for some in (Demonstrations([POOL[0], *untold], 1), Demonstrations([*untold, POOL[0]], 1)):
        assert some.before(solved(99), 0).images[0] == "picture 0"
    with pytest.raises(MMJaxError, match="0 of 20 records can be shown .* or have no answers"):
        Demonstrations(untold, 1).before(solved(99), 0)


def test_fewer_readable_examples_than_shots_are_no_shots():
    class Broken(list):
        def __getitem__(self, i):
            if i > 1:
                raise BadSample("corrupt_image", "cut off")
            return super().__getitem__(i)

    demos = Demonstrations(Broken(POOL[:4]), 2)
    assert len(demos.before(solved(99), 0).images) == 3
    with pytest.raises(MMJaxError, match="1 of 4 records can be shown before record r1, and 2"):
        demos.before(POOL[1], 1)


def test_mistakes_are_named():
    with pytest.raises(MMJaxError, match="20 shots need more than the 20 records"):
        Demonstrations(POOL, 20)
    with pytest.raises(MMJaxError, match="shots 2, text_shots 0 and demos None"):
        Task("t", POOL, shots=2)
    with pytest.raises(MMJaxError, match="one of the two numbers together with demos"):
        Task("t", POOL, shots=2, text_shots=2, demos=POOL)


def test_a_question_costs_the_same_however_many_records_there_are_to_show():
    class Many:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, i):
            return solved(i)

    demos = Demonstrations(Many(), 2)
    assert len(demos._among) == 2048  # the peer's query set
    first = demos.before(POOL[0], 0)
    tracemalloc.start()
    try:
        again = demos.before(POOL[0], 0)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert again == first and len(first.images) == 3
    assert most < 2**20  # an order of all records has 8 MB


def test_orders_of_the_examples_are_different_ones_and_the_drawn_one_is_first():
    demos = Demonstrations(POOL, 4)
    got = demos.in_orders(solved(99), 3, 6)
    assert got[0] == demos.before(solved(99), 3) and got == demos.in_orders(solved(99), 3, 6)
    shown = [r.images[:-1] for r in got]
    assert len(set(shown)) == 6 and len({frozenset(s) for s in shown}) == 1
    assert all(r.images[-1] == "picture 99" and r.meta["id"] == "r99" for r in got)
    for r in got:  # each answer stays with its picture
        said = [m.text for m in r.messages if m.role == "assistant"]
        assert [f"picture {text[1:]}" for text in said] == list(r.images)
    of_two = Demonstrations(POOL, 2).in_orders(solved(99), 3, 6)
    assert len(of_two) == 2 and of_two[0].images[:2] == of_two[1].images[1::-1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rices": "clip.pt"}, "rices 'clip.pt' is about the examples"),
        ({"orders": 6, "rank": "likelihood"}, "orders 6 is about the examples"),
        ({"orders": 6, "shots": 2, "demos": POOL}, "orders 6 without rank"),
        ({"orders": 1, "rank": "likelihood", "shots": 2, "demos": POOL}, "orders is 1; give at"),
        ({"rices_config": "ViT-L-14"}, "rices_config 'ViT-L-14' without rices"),
    ],
)
def test_what_is_about_examples_needs_them(settings, named):
    with pytest.raises(MMJaxError, match=named):
        Task("t", POOL, **settings)
