"""Records that follow a record as further turns: which of them, in which order, and their text."""

import numpy as np
import pytest
from stub_processor import StubProcessor, text_of

from mmjax.data.examples import RecordOptions, make_loader
from mmjax.data.mixture import Mixture
from mmjax.data.multiturn import Multiturn, draw_others, join, up_to
from mmjax.data.packing import BatchShape
from mmjax.data.skips import Skip
from mmjax.data.templates import TEMPLATES
from mmjax.types import BadSample, Message, MMJaxError, Record

PIXEL = np.zeros((2, 2, 3), np.uint8)


def record(name, images=0, marks=False, answer=None):
    question = ("<image>" * images if marks else "") + f"q{name}"
    messages = (Message("user", question), Message("assistant", answer or f"a{name}"))
    return Record(messages, (PIXEL,) * images, {"id": name})


@pytest.mark.parametrize(
    "first, others, limit, kept",
    [
        # By hand, after the peer's loop: stop at the first that brings the sum to the limit.
        (1, [1, 1, 1, 1], 4, [0, 1]),
        (1, [1, 1, 1, 1], 5, [0, 1, 2]),
        (1, [1, 1, 1, 1], 6, [0, 1, 2, 3]),
        (1, [3, 1], 4, []),  # it stops: the one behind it would have had room
        (1, [2, 1], 4, [0]),
        (0, [0, 0, 0], 1, [0, 1, 2]),
        (0, [0, 1, 0], 1, [0]),
        (5, [0, 0], 5, []),  # a first record at the limit gets nothing, not even text
        (9, [1], 5, []),  # one above it stays whole
        (2, [1, 0, 1], None, [0, 1, 2]),
        (1, [], 4, []),
    ],
)
def test_records_are_added_until_the_images_would_reach_the_limit(first, others, limit, kept):
    rest = [record(str(i), n) for i, n in enumerate(others)]
    got = up_to(record("x", first), iter(rest), limit)
    assert [r.meta["id"] for r in got] == ["x", *map(str, kept)]


def test_records_behind_the_one_that_ends_it_are_not_even_read():
    def others():
        yield record("0", 9)
        raise AssertionError("read on")

    assert len(up_to(record("x", 1), others(), 4)) == 1


def test_a_joined_record_is_one_conversation_with_every_image_at_its_own_question():
    system = Message("system", "be brief")
    second = Record((system, *record("b", 2).messages), (PIXEL, PIXEL))
    first = Record((system, *record("a", 1).messages), (PIXEL,), {"id": "a", "source": "s"})
    joined = join([first, second, record("c"), record("d", 1, marks=True)])
    assert [(m.role, m.text) for m in joined.messages] == [
        ("system", "be brief"),
        *(("user", "<image>qa"), ("assistant", "aa")),
        *(("user", "<image><image>qb"), ("assistant", "ab")),
        *(("user", "qc"), ("assistant", "ac")),
        *(("user", "<image>qd"), ("assistant", "ad")),
    ]
    assert len(joined.images) == 4 and joined.meta == first.meta
    talk = Record(record("b").messages + record("c").messages, (PIXEL,))  # two turns, no mark
    assert [m.text for m in join([first, talk]).messages][3:] == ["<image>qb", "ab", "qc", "ac"]
    alone = record("a", 1)
    assert join([alone]) is alone
    unanswered = Record((Message("user", "q"),))
    with pytest.raises(BadSample, match="does not end with an assistant turn"):
        join([unanswered, alone])


class Listed:
    """A source of given records; None is one that cannot be read."""

    def __init__(self, *records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        if self.records[i] is None:
            raise BadSample("corrupt_image", "broken")
        return self.records[i]


def loader(*sources, seq_len=200, seed=0, counts=None, template="simple_chat", **options):
    names = "xyz"[: len(sources)]
    mixture = Mixture.of(dict(zip(names, sources, strict=True)), counts=counts)
    shape = BatchShape(1, seq_len, 40, 200)
    return make_loader(mixture, template, StubProcessor(), shape, seed, RecordOptions(**options))


def text(example):
    return text_of(example["tokens"])


def supervised(example):
    return text_of(example["tokens"][example["loss_mask"]])


NUMBERS = Listed(*(record(str(i), i % 2) for i in range(10)))


def test_draws_are_functions_of_seed_source_record_and_epoch():
    load = loader(NUMBERS, multiturn=Multiturn(3))
    draws = [(0, i, e) for i in range(4) for e in range(3)]
    texts = [text(load(draw)) for draw in draws]
    again = loader(NUMBERS, multiturn=Multiturn(3))
    assert [text(again(draw)) for draw in reversed(draws)] == texts[::-1]
    assert len(set(texts)) == len(texts)
    other = loader(NUMBERS, multiturn=Multiturn(3), seed=1)
    assert text(other((0, 0, 0))) != texts[0]
    for (_, i, _), one in zip(draws, texts, strict=True):
        assert one.startswith(f"User:q{i} GPT:a{i}") and one.count("User:") == 4


def test_sources_are_drawn_by_their_share_of_an_epoch_and_their_records_alike():
    sources = Listed(*(record(f"x{i}") for i in range(4))), Listed(record("y0"), None)
    mixture = Mixture.of(dict(zip("xy", sources, strict=True)), counts={"x": 1, "y": 3})
    rng = np.random.default_rng(0)
    names = [r.meta["id"] for r in draw_others(mixture, TEMPLATES["plain"], 4000, rng)]
    # Half of y's draws meet the record that cannot be read, which is passed over.
    assert abs(len(names) - 2500) < 100
    shares = {name: names.count(name) / 4000 for name in set(names)}
    assert abs(shares.pop("y0") - 0.375) < 0.03
    assert set(shares) == {"x0", "x1", "x2", "x3"}
    assert all(abs(share - 0.0625) < 0.015 for share in shares.values())


def test_images_stand_at_their_turns_and_stay_below_the_limit():
    load = loader(NUMBERS, multiturn=Multiturn(20, max_images=4))
    counts = []
    for index in range(10):
        example = load((0, index, 0))
        counts.append(example["origin"].images)
        assert (example["visual_index"] >= 0).sum() == len(example["patches"]) == counts[-1]
    assert max(counts) == 3 and counts.count(3) > 5


@pytest.mark.parametrize("budget, added", [(17, 0), (32, 0), (33, 1), (48, 1), (49, 2), (65, 3)])
def test_a_token_budget_is_never_exceeded_and_never_left_to_spare(budget, added):
    """``User:q7 GPT:a7`` with <answer> and <eos> makes 16 tokens here, and <bos> opens it all."""
    same = Listed(*(record(str(i)) for i in range(10)))
    example = loader(same, multiturn=Multiturn(3, max_tokens=budget))((0, 7, 0))
    assert len(example["tokens"]) == 1 + 16 * (added + 1)
    assert text(example).count("User:") == added + 1
    # The turns that are left are the first of those without a budget.
    assert text(loader(same, multiturn=Multiturn(3))((0, 7, 0))).startswith(text(example))


def test_without_a_budget_rows_decide():
    same = Listed(*(record(str(i)) for i in range(10)))
    cut = loader(same, seq_len=40, multiturn=Multiturn(3), too_long="truncate")((0, 7, 0))
    assert len(cut["tokens"]) == 40 and supervised(cut).startswith("a7a")
    # Skipping what is too long would lose the record: it is used by itself.
    alone = loader(same, seq_len=40, multiturn=Multiturn(3))((0, 7, 0))
    assert text(alone) == "User:q7 GPT:a7"
    assert isinstance(loader(same, seq_len=10, multiturn=Multiturn(3))((0, 7, 0)), Skip)


def test_answers_that_hold_role_words_are_trained_whole():
    tricky = "ok\n### Human: no\n### Assistant: yes <|endofchunk|> User: GPT:"
    source = Listed(record("0", answer=tricky), record("1", answer=tricky))
    example = loader(source, seq_len=400, multiturn=Multiturn(1))((0, 0, 0))
    assert supervised(example) == tricky * 2


def test_a_bad_first_record_is_skipped_and_told():
    source = Listed(Record((Message("user", "q"),), meta={"id": "7"}), record("1"))
    got = loader(source, multiturn=Multiturn(3))((0, 0, 0))
    assert isinstance(got, Skip) and (got.id, got.reason) == ("7", "empty_answer")


@pytest.mark.parametrize("wrong", [dict(turns=0), dict(turns=1, max_images=0)])
def test_numbers_that_cannot_work_are_named(wrong):
    with pytest.raises(MMJaxError, match=r"multiturn\.\w+ is 0"):
        Multiturn(**wrong)
