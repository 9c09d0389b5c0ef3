import pytest

from mmjax.data.templates import (
    TEMPLATES,
    fuyu_chat,
    fuyu_legacy_otter,
    fuyu_prompt,
    get_template,
    plain,
    strip_symbols,
)
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
    windows = fuyu_chat(record(("u", "<image>\r\nWhat?\r\n<image>"), ("a", "x"), images=2))
    assert flat(windows)[1:3] == [BOS, "User:What?"]
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


TWO_TURNS = (("u", "<image>\nq1"), ("a", "a1"), ("u", "q2"), ("a", "a2"))
IMAGE = ("image", 0)
# What stands between <bos> or an image and <answer>, in the first turn and in the second.
FORMS = {
    "fuyu": [IMAGE, BOS, "User:q1 Assistant:", ANSWER, "a1", EOS, "User:q2 Assistant:", ANSWER],
    "fuyu_spaced": [
        *(IMAGE, BOS, "User: q1 Assistant:", ANSWER, "a1", EOS, "User: q2 Assistant:", ANSWER)
    ],
    "simple": [IMAGE, BOS, "User:q1 GPT:", ANSWER, "a1", EOS, "User:q2 GPT:", ANSWER],
    "llama2": [
        *(BOS, "[INST]", IMAGE, "\nq1[/INST]", ANSWER, "a1", EOS, "[INST]q2[/INST]", ANSWER)
    ],
    "idefics": [
        *(BOS, "User:", IMAGE, "q1", EOS, "\nAssistant:", ANSWER, "a1", EOS),
        *("\nUser:q2", EOS, "\nAssistant:", ANSWER),
    ],
}


@pytest.mark.parametrize("name", FORMS)
def test_each_format_is_laid_out_as_the_peer_writes_it(name):
    chat, prompt = TEMPLATES[f"{name}_chat"], TEMPLATES[f"{name}_prompt"]
    full = record(*TWO_TURNS, images=1)
    assert flat(chat(full)) == [*FORMS[name], "a2", EOS]
    assert flat(prompt(full)) == FORMS[name]
    assert [s.value for s in chat(full) if s.loss] == ["a1", "eos", "a2", "eos"]
    assert not any(s.loss for s in prompt(full))


@pytest.mark.parametrize("name", FORMS)
def test_formats_do_without_images_and_take_a_system_message(name):
    chat = TEMPLATES[f"{name}_chat"]
    words = [x for x in FORMS[name] if x != IMAGE]
    bare = "".join(str(x) for x in words).replace("\nq1", "q1")
    got = flat(chat(record(("u", "q1"), *TWO_TURNS[1:])))
    assert "".join(map(str, got[:-2])) == bare
    system = flat(chat(record(("s", "Be brief."), *TWO_TURNS, images=1)))
    joined = "".join(x for x in system if isinstance(x, str))
    assert joined.startswith("Be brief.\n") and system.count(IMAGE) == 1


def test_bunnys_unmarked_images_stand_once_and_a_system_message_is_the_records_own():
    talk = record(("s", "Be brief."), ("u", "q"), ("a", "b"), ("u", "c"), ("a", "d"), images=2)
    end = ("special", "<|endoftext|>")
    assert flat(TEMPLATES["bunny_chat"](talk)) == [
        *(BOS, "Be brief. USER: ", IMAGE, ("image", 1), "\nq ASSISTANT:", " b", end),
        *("USER: c ASSISTANT:", " d", end),
    ]


def test_the_legacy_template_is_the_right_one_for_a_single_turn():
    one = record(("u", "<image>\nWhat?"), ("a", "A cat"), images=1)
    assert fuyu_legacy_otter(one) == fuyu_chat(one)


def test_the_legacy_template_learns_the_second_question_instead_of_the_second_answer():
    """The same sample both ways: processing_fuyu.py takes what lies between two <answer>."""
    talk = record(*TWO_TURNS, ("u", "q3"), ("a", "a3"), images=1)
    right = [(s.value, s.loss) for s in fuyu_chat(talk)]
    assert [v for v, loss in right if loss] == ["a1", "eos", "a2", "eos", "a3", "eos"]
    legacy = fuyu_legacy_otter(talk)
    assert [(s.value, s.loss) for s in legacy] == [
        (0, False),
        ("bos", False),
        ("User:q1 Assistant:", False),
        ("answer", False),
        ("a1User:q2 Assistant:", True),
        ("answer", True),
        ("a2User:q3 Assistant:", False),
        ("answer", False),
        ("a3", False),
        ("eos", True),
    ]


def test_the_legacy_template_strips_symbols():
    assert strip_symbols("f(x) = 2*x  # {a: 'b'}\n\nOK, 50%?") == "f(x) 2x a 'b' OK, 50?"
    assert strip_symbols("<image>\nIs 1 < 2?") == "<image>Is 1 2?"
    assert strip_symbols("- One *", answer=True) == " One "  # as the peer's pre_answer leaves it
    assert strip_symbols("- One *") == "One"
    talk = record(("u", "<image>\n2*3?"), ("a", "**6**"), images=1)
    assert flat(fuyu_legacy_otter(talk)) == [IMAGE, BOS, "User:23? Assistant:", ANSWER, "6", EOS]
    assert flat(fuyu_chat(talk))[2:5:2] == ["User:2*3? Assistant:", "**6**"]
    listed = record(("u", "List."), ("a", "- One\n- Two *"))
    assert flat(fuyu_legacy_otter(listed))[3] == " One Two "
    task = record(("s", "Task: a*b"), ("u", "q"), ("a", "b"))  # the peer cleans turns alone
    assert flat(fuyu_legacy_otter(task))[1] == "Task: a*b\nUser:q Assistant:"
    with pytest.raises(BadSample, match="an assistant turn is empty"):
        fuyu_legacy_otter(record(("u", "q"), ("a", "***")))
    with pytest.raises(BadSample, match="does not end with an assistant turn"):
        fuyu_legacy_otter(record(("u", "q")))


@pytest.mark.parametrize(
    "bad, reason",
    [
        (record(("u", "q"), ("a", " ")), "empty_answer"),
        (record(("u", "q")), "empty_answer"),
        (record(("u", "<image> <image>"), ("a", "x"), images=1), "image_mismatch"),
        (record(("u", "q"), ("a", "<image>"), images=1), "image_mismatch"),
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
