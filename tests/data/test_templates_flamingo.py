"""Flamingo's templates beside the strings that the peers' code writes."""

import pytest

from mmjax.data.templates import TEMPLATES
from mmjax.data.templates_flamingo import GUANACO_SYSTEM
from mmjax.data.turns import name_record
from mmjax.types import BadSample, Message, Record

ROLES = {"s": "system", "u": "user", "a": "assistant"}
MARKS = {"bos": "<s>", "eos": "</s>", "eoc": "<|endofchunk|>", "answer": "<answer>", "cut": "~"}


def record(*turns, images=0):
    messages = tuple(Message(ROLES[role], text) for role, text in turns)
    return Record(messages, tuple(b"x" for _ in range(images)), {"id": "7", "source": "f.json"})


def written(segments, loss=None):
    """The segments as one string, images as <image>; or only those with this loss flag."""
    chosen = [s for s in segments if loss is None or s.loss == loss]
    return "".join(
        "<image>" if s.kind == "image" else MARKS[s.value] if s.kind == "special" else s.value
        for s in chosen
    )


ONE = (("u", "<image>\nWhat?"), ("a", " A cat. "))
TWO = (*ONE, ("u", "<image>And this?"), ("a", "A dog."))
FORMS = {
    "otter": (
        "<s><image>User: What? GPT:<answer> A cat.<|endofchunk|>"
        "<image>User: And this? GPT:<answer> A dog.<|endofchunk|></s>"
    ),
    "otter_tight": (
        "<s><image>User:What? GPT:<answer>A cat.<|endofchunk|>"
        "<image>User:And this? GPT:<answer>A dog.<|endofchunk|></s>"
    ),
    "open_flamingo_caption": (
        "<s><image>Output:A cat.<|endofchunk|>\n<image>Output:A dog.<|endofchunk|>"
    ),
    "open_flamingo_vqa": (
        "<s><image>Question:What? Short answer:A cat.<|endofchunk|>\n"
        "<image>Question:And this? Short answer:A dog.<|endofchunk|>"
    ),
    "guanaco": (
        f"<s>{GUANACO_SYSTEM}\n### Human: <image>\nWhat?\n### Assistant: ~ A cat. </s>"
        "\n### Human: <image>And this?\n### Assistant: ~A dog.</s>"
    ),
    "guanaco_no_prompt": (
        "<s>### Human: <image>\nWhat?\n### Assistant: ~ A cat. </s>"
        "\n### Human: <image>And this?\n### Assistant: ~A dog.</s>"
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_format_is_written_as_the_peer_writes_it(name):
    segments = TEMPLATES[f"{name}_chat"](record(*TWO, images=2))
    assert written(segments) == FORMS[name]
    if "guanaco" in name:  # white space as it is written
        assert written(segments, loss=True) == " A cat. </s>A dog.</s>"
    else:
        space, end = " " * (name == "otter"), "<|endofchunk|>"
        close = "</s>" * name.startswith("otter")
        assert written(segments, loss=True) == f"{space}A cat.{end}{space}A dog.{end}{close}"
    assert [s.value for s in segments if s.kind == "image"] == [0, 1]


@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_is_the_training_stream_up_to_the_last_answer(name):
    chat, prompt = TEMPLATES[f"{name}_chat"], TEMPLATES[f"{name}_prompt"]
    full = record(*TWO, images=2)
    segments = prompt(full)
    train = chat(full)
    assert written(segments) == written(train[: -3 if name.startswith("otter") else -2])
    assert not any(s.loss for s in segments)
    assert prompt(Record(full.messages[:-1], full.images)) == segments
    with pytest.raises(BadSample, match="no question"):
        prompt(record(("s", "Be brief.")))
    with pytest.raises(BadSample, match="nothing to train on"):
        chat(record(("u", "q")))
    for template, says in ((chat, "nothing to train on"), (prompt, "no question")):
        with pytest.raises(BadSample, match=says):
            template(record())


def test_without_marks_all_images_open_the_first_question():
    bare = (("u", "What?"), ("a", "A cat."), ("u", "Sure?"), ("a", "Yes."))
    otter = TEMPLATES["otter_chat"](record(*bare, images=2))
    assert written(otter).startswith("<s><image><image>User: What? GPT:")
    guanaco = TEMPLATES["guanaco_no_prompt_prompt"](record(*bare, images=1))
    assert written(guanaco).startswith("<s>### Human: <image>What?\n### Assistant: ~A cat.</s>\n#")
    for text in ("  What? ", "What?\n", " "):  # white space without a mark that it belongs to
        spaced = TEMPLATES["otter_prompt"](record(("u", text)))
        assert written(spaced) == f"<s>User: {text} GPT:<answer>"


def test_marks_inside_a_question_stay_there():
    inside = record(("u", "<image> Is it <image> or <image>?"), ("a", "x"), images=3)
    words = "Is it <image> or <image>?"
    assert f"<image>User: {words} GPT:" in written(TEMPLATES["otter_chat"](inside))
    assert f"Human: <image> {words}\n" in written(TEMPLATES["guanaco_chat"](inside))
    apart = record(("u", "<image> \r\n<image>\nWhat?\n"), images=2)  # nothing but space between
    assert written(TEMPLATES["otter_prompt"](apart)) == (
        "<s><image><image>User: What?\n GPT:<answer>"
    )
    assert "<image><image><image>Output:x" in written(
        TEMPLATES["open_flamingo_caption_chat"](inside)
    )


def test_a_system_message_is_a_line_and_replaces_guanacos():
    told = record(("s", "Be brief."), *ONE, images=1)
    assert written(TEMPLATES["guanaco_chat"](told)).startswith(
        "<s>Be brief.\n### Human: <image>\nW"
    )
    assert written(TEMPLATES["otter_chat"](told)).startswith("<s>Be brief.\n<image>User: What?")


def test_examples_may_lack_images_as_in_zero_shot_prompts():
    shots = record(("u", ""), ("a", "One."), ("u", "<image>"), ("a", "Two."), images=1)
    prompt = TEMPLATES["open_flamingo_caption_prompt"](shots)
    assert written(prompt) == "<s>Output:One.<|endofchunk|>\n<image>Output:"


def test_laions_targets_are_all_but_the_image():
    segments = TEMPLATES["laion_caption"](record(("a", " A cat. "), images=1))
    assert written(segments) == "<s><image>A cat.<|endofchunk|></s>"
    assert written(segments, loss=True) == "A cat.<|endofchunk|></s>"
    asked = TEMPLATES["laion_caption"](record(("u", "<image>\nDescribe."), *ONE[1:], images=1))
    assert asked == segments
    with pytest.raises(BadSample, match="nothing to train on"):
        TEMPLATES["laion_caption"](record(("u", "<image>\nDescribe."), images=1))


def test_an_interleaved_document_learns_what_follows_its_images():
    text = "Intro. <image> One two. Three <image> four."
    segments = TEMPLATES["interleaved"](record(("u", text), images=2))
    assert written(segments) == (
        "<s>Intro.<image>One two. Three<|endofchunk|><image>four.<|endofchunk|></s>"
    )
    assert written(segments, loss=True) == "One two. Three<|endofchunk|>four.<|endofchunk|>"
    turns = record(("u", "<image>a"), ("a", "b"), ("u", "<image><image>c"), images=3)
    segments = TEMPLATES["interleaved"](turns)
    assert written(segments) == (
        "<s><image>a b<|endofchunk|><image><|endofchunk|><image>c<|endofchunk|></s>"
    )
    assert written(segments, loss=True) == "a b<|endofchunk|>c<|endofchunk|>"
    unmarked = TEMPLATES["interleaved"](record(("u", "a"), images=1))
    assert written(unmarked) == "<s><image>a<|endofchunk|></s>"
    assert all(s.value for s in unmarked if s.kind == "text")


@pytest.mark.parametrize(
    "bad, reason, says",
    [
        (record(("u", "a")), "image_mismatch", r"0 <image> mark\(s\) for 0 image\(s\)"),
        (record(("u", "<image>a<image>b"), images=1), "image_mismatch", "2 <image>"),
        (record(("u", "a<image> "), images=1), "empty_answer", "no text follows"),
        (record(("u", "<image>a<image> "), images=2), "empty_answer", "no text follows"),
    ],
)
def test_documents_that_teach_nothing_are_bad(bad, reason, says):
    with pytest.raises(BadSample, match=says) as error:
        TEMPLATES["interleaved"](bad)
    assert error.value.reason == reason and "f.json (id 7)" in str(error.value)
    assert name_record(Record((), (), {"line": 3, "source": "f.json"})) == "f.json:3 (id ?)"
    assert name_record(Record((), ())) == "record (id ?)"
