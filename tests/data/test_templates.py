import pytest

from mmjax.data.templates import fuyu_chat, fuyu_prompt, get_template, plain
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment


def record(*turns, images=0):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = tuple(Message(roles[role], text) for role, text in turns)
    return Record(messages, tuple(b"x" for _ in range(images)), {"id": "7", "source": "f.json"})


def flat(segments):
    return [s.value if s.kind == "text" else (s.kind, s.value) for s in segments]


BOS, ANSWER, EOS = ("special", "bos"), ("special", "answer"), ("special", "eos")


def test_single_turn_supervises_exactly_the_answer_and_its_eos():
    segments = fuyu_chat(record(("u", "What?"), ("a", " A cat "), images=1))
    assert segments == [
        Segment("image", 0),
        Segment("special", "bos"),
        Segment("text", "User:What? Assistant:"),
        Segment("special", "answer"),
        Segment("text", "A cat", loss=True),
        Segment("special", "eos", loss=True),
    ]


def test_every_answer_of_a_conversation_is_supervised():
    segments = fuyu_chat(record(("s", "Be brief."), ("u", "a"), ("a", "b"), ("u", "c"), ("a", "d")))
    assert flat(segments) == [
        *(BOS, "Be brief.\nUser:a Assistant:", ANSWER, "b", EOS),
        *("User:c Assistant:", ANSWER, "d", EOS),
    ]
    assert [s.value for s in segments if s.loss] == ["b", "eos", "d", "eos"]


def test_marks_place_images_and_take_their_line_ends_along():
    leading = fuyu_chat(record(("u", "<image>\nWhat?"), ("a", "x"), images=1))
    assert flat(leading)[:3] == [("image", 0), BOS, "User:What? Assistant:"]
    inside = fuyu_chat(
        record(
            ("u", "<image><image>Is <image> it?"),
            ("a", "x"),
            ("u", "<image>\nAnd?"),
            ("a", "y"),
            images=4,
        )
    )
    assert flat(inside) == [
        *(("image", 0), ("image", 1), BOS, "User:Is ", ("image", 2), " it? Assistant:", ANSWER),
        *("x", EOS, "User:", ("image", 3), "And? Assistant:", ANSWER, "y", EOS),
    ]


def test_prompt_is_the_training_stream_up_to_the_last_answer():
    full = record(("u", "<image>\na"), ("a", "b"), ("u", "c"), ("a", "d"), images=1)
    train, prompt = fuyu_chat(full), fuyu_prompt(full)
    assert [(s.kind, s.value) for s in prompt] == [(s.kind, s.value) for s in train[:-2]]
    assert not any(s.loss for s in prompt)
    open_question = Record(full.messages[:-1], full.images)
    assert fuyu_prompt(open_question) == prompt


def test_plain_is_bare_text():
    assert flat(plain(record(("u", "1+1="), ("a", "2"), images=1))) == [
        *(("image", 0), BOS, "1+1=", "2", EOS)
    ]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (record(("u", "q"), ("a", " ")), "empty_answer"),
        (record(("u", "q")), "empty_answer"),
        (record(("u", "<image> <image>"), ("a", "x"), images=1), "image_count"),
        (record(("u", "q"), ("a", "<image>"), images=1), "image_count"),
    ],
)
def test_bad_records_have_a_reason_and_name_the_record(bad, reason):
    with pytest.raises(BadSample, match=r"f\.json \(id 7\)") as error:
        fuyu_chat(bad)
    assert error.value.reason == reason


def test_unknown_template_names_the_nearest():
    assert get_template("fuyu_chat") is fuyu_chat
    assert get_template(plain) is plain
    with pytest.raises(MMJaxError, match="did you mean 'fuyu_chat'"):
        get_template("fuyu-chat")
