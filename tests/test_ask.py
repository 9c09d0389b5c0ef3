"""Asking in a template's words: from Python, and in the terminal."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import ask
from mmjax.data import templates
from mmjax.loaded import LoadedModel
from mmjax.models.fuyu.processor import FuyuProcessor
from mmjax.models.fuyu.processor_config import ProcessorConfig
from mmjax.types import Message, MMJaxError
from tests.parity import peer
from tests.tiny_tokenizer import build_tiny_tokenizer

QUESTION = "what colour is the circle?"
TURNS = [Message("user", f"<image>{QUESTION}"), Message("assistant", "red"), Message("user", "why")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuyu")
    processor = FuyuProcessor(ProcessorConfig(patch_size=peer.PATCH), build_tiny_tokenizer())
    ids = processor.token_ids()
    sizes = dict(vocab=ids["vocab_size"], image=ids["image_token_id"], eos=ids["eos_token_id"])
    peer.tiny_fuyu(**sizes).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "a b.png"
    pixels = np.random.default_rng(0).integers(0, 256, (7, 14, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


@pytest.fixture(scope="module")
def model(folder):
    return mmjax.load(folder)


@pytest.mark.parametrize("template", ["fuyu_prompt", "fuyu_chat", templates.fuyu_prompt])
def test_a_template_asks_in_its_words(model, picture, template):
    by_hand = model.encode(f"User:{QUESTION} Assistant:", picture)["tokens"]
    for prompt in (QUESTION, f"<image>\n{QUESTION}", [Message("user", QUESTION)]):
        found = model.encode(prompt, picture, template=template)["tokens"]
        np.testing.assert_array_equal(found, by_hand)
    (want,) = model.generate([f"User:{QUESTION} Assistant:"], [picture], max_new_tokens=4)
    assert model.generate(QUESTION, picture, max_new_tokens=4, template=template) == [want]
    tokens, logits = model.logits(QUESTION, picture, template=template)
    np.testing.assert_array_equal(logits, model.logits(by_hand, picture)[1])
    np.testing.assert_array_equal(tokens, by_hand)


def test_a_conversation_is_one_prompt(model, picture):
    tokens = model.encode(TURNS, picture, template="fuyu_prompt")["tokens"].tolist()
    first = model.encode(TURNS[:1], picture, template="fuyu_prompt")["tokens"].tolist()
    eos, answer = model.processor.eos_token_id, model.processor.config.answer_token_id
    assert tokens[: len(first)] == first and first[-1] == answer
    assert tokens.count(answer) == 2 and tokens[-1] == answer
    assert model.processor.decode(tokens[len(first) : tokens.index(eos)]) == "red"
    alone = model.generate(TURNS, [picture], max_new_tokens=4, template="fuyu_prompt")
    asked = [TURNS, QUESTION]
    both = model.generate(asked, [picture, None], max_new_tokens=4, template="fuyu_prompt")
    assert both[:1] == alone and len(both) == 2


@pytest.mark.parametrize(
    "prompt, template, told",
    [
        ([1, 20], "fuyu_prompt", "token ids are used as they are: leave the template away"),
        (TURNS, None, "conversation: give the template that lays it out"),
        (QUESTION, "fuyu_promt", "did you mean 'fuyu_prompt'"),
        (QUESTION, 3, "unknown template '3'"),
        (QUESTION, "plain", "does not tell how tasks are asked"),
        ("<image><image>", "fuyu_prompt", r"2 <image> mark\(s\) for 1 image\(s\)"),
        (TURNS[:2], "fuyu_prompt", None),  # the last answer is what is asked for
    ],
)
def test_what_cannot_be_asked(model, picture, prompt, template, told):
    if told is None:
        tokens = model.encode(prompt, picture, template=template)["tokens"]
        want = model.encode(prompt[:1], picture, template=template)["tokens"]
        np.testing.assert_array_equal(tokens, want)
        return
    with pytest.raises(MMJaxError, match=told):
        model.encode(prompt, picture, template=template)


def test_one_question_from_the_terminal(model, folder, picture, capsys):
    options = ["--image", picture, "--max-new-tokens", "4"]
    ask.main([str(folder), QUESTION, *options])
    ask.main([str(folder), QUESTION, *options, "--template", "fuyu_chat"])
    raw = model.generate(QUESTION, picture, max_new_tokens=4)
    laid_out = model.generate(QUESTION, picture, max_new_tokens=4, template="fuyu_prompt")
    assert raw != laid_out
    assert capsys.readouterr().out == f"{raw[0]}\n{laid_out[0]}\n"


@pytest.mark.parametrize(
    "options, told",
    [
        ({"top_p": 2.0}, "0 < top_p <= 1, got .*top_p=2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a whole number from 1 up"),
        ({"num_beams": 0}, "num_beams is 0; give a whole number from 1 up"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams is 2 with temperature 1.0"),
    ],
)
def test_settings_of_answers_are_looked_at_before_anything_is_read(model, options, told):
    with pytest.raises(MMJaxError, match=told):
        model.generate(QUESTION, "nowhere.png", **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with pytest.raises(MMJaxError, match=told):
        ask.main(["no/such/model", QUESTION, *flags])


def test_a_conversation_in_the_terminal(folder, picture, capsys, monkeypatch):
    """What a folder notes is the template; a mistake ends nothing and is no part of it."""
    asked = []

    def generate(self, prompts, images, **options):
        asked.append((prompts[0], images[0], options["template"]))
        if "long" in prompts[0][-1].text:
            raise MMJaxError("too long")
        return [" " if "nothing" in prompts[0][-1].text else f"answer {len(asked)}"]

    monkeypatch.setattr(LoadedModel, "generate", generate)
    lines = ["one", "/image nowhere.png", "/imagine", f"/image {picture}", "long", "two", "",
             "nothing", "three", "/new", f"/image {picture}", "four <image>"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    ask.main([str(folder), "--template", "fuyu_prompt"])
    out, err = capsys.readouterr()
    assert out.splitlines() == ["answer 1", "answer 3", " ", "answer 5", "answer 6"]
    told = [line.split(":", 1)[1].strip() for line in err.splitlines() if "error:" in line]
    assert told[0].startswith("nowhere.png: ")
    assert told[1].startswith("there is no /imagine:") and told[2:] == ["too long"]
    texts = [[m.text for m in messages] for messages, _, _ in asked]
    assert texts[0] == ["one"] and texts[5] == ["four <image>"]
    assert texts[2] == ["one", "answer 1", "<image>two"]  # the picture waited for it
    assert texts[4] == [*texts[2], "answer 3", "three"]
    assert [images for _, images, _ in asked] == [[], *[[picture]] * 5]
    assert {template for *_, template in asked} == {"fuyu_prompt"}


def test_a_folder_may_tell_its_template(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(MMJaxError, match="does not tell in which words it was trained"):
        ask.main([str(folder)])
    with pytest.raises(MMJaxError, match="^b.png: "):
        ask.main([str(folder), QUESTION, "--image", "b.png"])

    from convert_weights import to_jax

    noted = tmp_path / "noted"
    to_jax.main([str(folder), str(noted)])
    config = json.loads((noted / "config.json").read_text())
    assert "template" not in config["mmjax"]
    config["mmjax"]["template"] = "fuyu_spaced_prompt"
    (noted / "config.json").write_text(json.dumps(config))
    loaded = mmjax.load(noted)
    assert loaded.template == "fuyu_spaced_prompt"
    want = loaded.generate(f"User: {QUESTION} Assistant:", max_new_tokens=4)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    ask.main([str(noted), "--max-new-tokens", "4"])
    ask.main([str(noted), QUESTION, "--max-new-tokens", "4"])
    assert capsys.readouterr().out.splitlines() == want * 2
