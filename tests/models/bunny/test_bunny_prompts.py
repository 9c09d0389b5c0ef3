"""Bunny's processor: where images stand, what is cut, files and back, and what it refuses."""

import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_language_tokenizers import (
    build_llama3_tokenizer,
    build_llama_tokenizer,
    build_neox_tokenizer,
)
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmjax.data.examples import make_loader
from mmjax.data.mixture import Mixture
from mmjax.data.packing import BatchShape
from mmjax.data.templates import TEMPLATES
from mmjax.data.templates_bunny import SYSTEM
from mmjax.models.bunny.processor import BunnyProcessor, ProcessorConfig
from mmjax.models.normalisation import CLIP_MEAN, CLIP_STD
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

SMALL = ProcessorConfig(image_size=8, image_tokens=4)
PHI = BunnyProcessor(SMALL, build_neox_tokenizer())
LLAMA = BunnyProcessor(SMALL, build_llama_tokenizer())
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def picture(seed=0, width=8, height=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def record(*turns, images=0):
    messages = tuple(Message(ROLES[role], text) for role, text in turns)
    return Record(messages, tuple(picture(i) for i in range(images)), {"id": "7"})


def encode(processor, template, one, **options):
    return processor.encode(TEMPLATES[template](one), one.images, **options)


def written(segments):
    """All but <bos> as one string, images as their numbers."""
    said = [s for s in segments if s.value != "bos"]
    return "".join(f"<{s.value}>" if s.kind == "image" else s.value for s in said)


def ids(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


ONE = record(("u", "<image>\nWhat is it?"), ("a", "A dog."), images=1)


@pytest.mark.parametrize("processor, name", [(PHI, "bunny"), (LLAMA, "bunny_minicpm")])
def test_an_image_is_a_run_of_tokens_that_point_at_its_row(processor, name):
    two = record(("u", "<image>\nThis?"), ("a", "A dog."), ("u", "That? <image>"), images=2)
    example = encode(processor, f"{name}_prompt", two)
    end, image = processor.tokenizer.eos_token, [0] * 4
    front = [*processor.opening, *ids(processor, f"{SYSTEM} USER: ")]
    middle = ids(processor, f"\nThis? ASSISTANT: A dog.{end}USER: ")
    want = [*front, *image, *middle, *image, *ids(processor, "\nThat? ASSISTANT:")]
    assert example["tokens"].tolist() == want and example["tokens"].dtype == np.int32
    rows = [-1] * len(front) + [0] * 4 + [-1] * len(middle) + [1] * 4
    np.testing.assert_array_equal(example["visual_index"][: len(rows)], rows)
    assert (example["visual_index"][len(rows) :] == -1).all()
    assert example["visual_index"].dtype == np.int32
    np.testing.assert_array_equal(example["positions"], np.arange(len(want)))
    np.testing.assert_array_equal(example["patches"].reshape(2, 8, 8, 3), two.images)
    np.testing.assert_array_equal(processor.picture(example["patches"][1]), two.images[1])


def test_a_prompt_is_a_string_with_marks_or_the_peers_ids():
    images = [picture(0), picture(1)]
    marked = PHI.encode_prompt("<image><image>\nWhat?", images)
    front = PHI.encode_prompt("What?", images)
    given = PHI.encode_prompt([-200, -200, *ids(PHI, "\nWhat?")], images)
    for key in marked:
        np.testing.assert_array_equal(front[key], marked[key])
        np.testing.assert_array_equal(given[key], marked[key])
    assert marked["tokens"].tolist() == [0] * 8 + ids(PHI, "\nWhat?")
    assert marked["visual_index"][:8].tolist() == [0] * 4 + [1] * 4
    assert not marked["loss_mask"].any()
    text = LLAMA.encode_prompt("What?")
    assert text["tokens"].tolist() == LLAMA.tokenizer("What?")["input_ids"]
    assert text["patches"].shape == (0, 192) and text["patches"].dtype == np.uint8
    with pytest.raises(BadSample, match=r"1 <image> mark\(s\) and there are 2"):
        PHI.encode_prompt("<image> what?", images)
    with pytest.raises(BadSample, match="0 <image> mark"):
        PHI.encode_prompt([5], images)
    with pytest.raises(MMJaxError, match="integer token ids, not float64"):
        PHI.encode_prompt([0.5])


def test_a_prompt_written_out_is_what_a_template_lays_out():
    """As docs/bunny.md asks: the words of training, and a dialogue with the end mark in it."""
    asked = f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    more = f"{asked} A cat.<|endoftext|>USER: Is it asleep? ASSISTANT:"
    turns = [("u", "<image>\nWhat is this?"), ("a", "A cat."), ("u", "Is it asleep?")]
    for text, count in ((asked, 1), (more, 3)):
        want = encode(PHI, "bunny_prompt", record(*turns[:count], images=1))
        got = PHI.encode_prompt(text, [picture(0)])
        for key in want:
            np.testing.assert_array_equal(got[key], want[key], err_msg=key)


def test_unmarked_images_leading_answers_and_system_messages():
    bare = record(("u", "What is it?"), ("a", "A dog."), images=1)
    led = record(("a", "Hello."), ("u", ONE.messages[0].text), ("a", "A dog."), images=1)
    want = encode(PHI, "bunny_chat", ONE)
    for other in (bare, led):
        np.testing.assert_array_equal(encode(PHI, "bunny_chat", other)["tokens"], want["tokens"])
    told = record(("s", "Be brief."), ("u", "Hm?"), ("a", "No."))
    example = encode(PHI, "bunny_chat", told)
    text = "Be brief. USER: Hm? ASSISTANT: No.<|endoftext|>"
    assert example["tokens"].tolist() == ids(PHI, text)
    for turns in ([("u", "a"), ("u", "b"), ("a", "c")], [("u", "a"), ("s", "b"), ("a", "c")]):
        with pytest.raises(BadSample, match="do not alternate") as caught:
            encode(PHI, "bunny_chat", record(*turns))
        assert caught.value.reason == "bad_record"


@pytest.mark.parametrize(
    "name, end",
    [
        ("bunny", "<|endoftext|>"),
        ("bunny_phi3", "<|endoftext|>"),
        ("bunny_minicpm", "</s>"),
        ("bunny_llama", "<|end_of_text|>"),
        ("bunny_gemma", "<eos>"),
    ],
)
def test_each_template_is_the_peers_dialogue_with_its_own_end(name, end):
    two = record(
        ("u", " What <image>\nis it? <image>"), ("a", " A dog. "), ("u", " <image> "), ("a", "No."),
        ("u", " Sure? "), ("a", "Yes."), images=3,
    )  # fmt: skip
    said = TEMPLATES[f"{name}_chat"](two)
    assert written(said) == (
        f"{SYSTEM} USER: <0><1>\nWhat \nis it? ASSISTANT:  A dog. {end}"
        f"USER: <2> ASSISTANT: No.{end}USER:  Sure?  ASSISTANT: Yes.{end}"
    )
    assert written([s for s in said if s.loss]) == f"  A dog. {end} No.{end} Yes.{end}"
    prompt = TEMPLATES[f"{name}_prompt"](two)
    assert written(prompt) == written(said[:-2]) and not any(s.loss for s in prompt)
    front = TEMPLATES[f"{name}_prompt"](record(("u", "a"), ("a", "b"), ("u", "c"), images=2))
    assert written(front) == f"{SYSTEM} USER: <0><1>\na ASSISTANT: b{end}USER: c ASSISTANT:"
    for bad, says in ((record(), "not end with"), (record(("s", "b"), ("a", "c")), "alternate")):
        with pytest.raises(BadSample, match=says):
            TEMPLATES[f"{name}_chat"](bad)
    with pytest.raises(BadSample, match="not end with"):
        TEMPLATES[f"{name}_chat"](record(("u", "a")))


def test_pretraining_needs_an_image_and_one_caption():
    example = encode(PHI, "bunny_plain", record(("a", "A dog."), images=1))
    caption = ids(PHI, "A dog.\n")
    assert example["tokens"].tolist() == [0] * 4 + caption
    assert example["loss_mask"].tolist() == [False] * 4 + [True] * len(caption)
    spaced = TEMPLATES["bunny_plain"](record(("u", "Hm?"), ("a", " A dog. "), images=2))
    assert [s.value for s in spaced] == ["bos", 0, 1, " A dog. \n"]
    with pytest.raises(BadSample, match="not end with"):
        TEMPLATES["bunny_plain"](record(("u", "Hm?"), images=1))
    asked = encode(PHI, "bunny_plain_prompt", record(("u", "Hm?"), ("a", "A dog."), images=1))
    assert asked["tokens"].tolist() == [0] * 4 and not asked["loss_mask"].any()
    with pytest.raises(BadSample, match="needs an image"):
        encode(PHI, "bunny_plain_prompt", record(("u", "Hm?")))
    with pytest.raises(BadSample, match=r"1 <image> mark\(s\) for 2"):
        encode(PHI, "bunny_plain_prompt", record(("u", "<image>"), images=2))
    for bad, says in (
        (record(("u", "Hm?"), ("a", "A dog.")), "needs an image"),
        (record(("u", "a"), ("a", "b"), ("u", "a"), ("a", "b"), images=1), "more than one caption"),
        (record(("u", "<image>"), ("a", " "), images=1), "is empty"),
        (record(("u", "<image>"), ("a", "b"), images=2), r"1 <image> mark\(s\) for 2"),
        (record(("u", "a"), ("a", "<image>b"), images=1), "stands in an assistant turn"),
    ):
        with pytest.raises(BadSample, match=says):
            encode(PHI, "bunny_plain", bad)


def test_cut_on_the_right_maybe_inside_an_image():
    two = record(("u", "<image>"), ("a", "A dog."), ("u", "<image>\nHm?"), ("a", "No."), images=2)
    whole = encode(PHI, "bunny_chat", two)
    second = int(np.flatnonzero(whole["visual_index"] == 1)[0])
    for at, rows in ((second + 2, 2), (second, 1)):
        cut = PHI.truncate(whole, at)
        for key in ("tokens", "visual_index", "loss_mask", "positions"):
            np.testing.assert_array_equal(cut[key], whole[key][:at])
        np.testing.assert_array_equal(cut["patches"], whole["patches"][:rows])
    short = PHI.with_options(model_max_length=second)
    np.testing.assert_array_equal(short.truncate(whole, 10_000)["tokens"], whole["tokens"][:second])
    assert len(encode(short, "bunny_chat", two)["tokens"]) == len(whole["tokens"])
    with pytest.raises(BadSample, match="no target") as caught:
        PHI.truncate(whole, 9)
    assert caught.value.reason == "too_long"


def test_too_long_is_told_before_an_image_is_read():
    unreadable = Record(ONE.messages, (b"no image",))
    short = PHI.with_options(model_max_length=20)
    for processor, limit in ((PHI, 20), (short, 10_000)):
        with pytest.raises(BadSample, match="above max_tokens = 20") as caught:
            encode(processor, "bunny_chat", unreadable, max_tokens=limit)
        assert caught.value.reason == "too_long"
    with pytest.raises(BadSample) as caught:
        encode(PHI, "bunny_chat", unreadable)
    assert caught.value.reason == "corrupt_image"


def test_padding_is_centred_in_the_mean_colour():
    wide = picture(width=8, height=4)
    padded = PHI.with_options(image_aspect_ratio="pad", image_mean=CLIP_MEAN)
    square = padded.encode_prompt([-200], [wide])["patches"].reshape(8, 8, 3)
    np.testing.assert_array_equal(square[2:6], wide)
    assert (square[[0, 1, 6, 7]] == (122, 116, 104)).all()
    squashed = PHI.encode_prompt([-200], [wide])["patches"].reshape(8, 8, 3)
    want = Image.fromarray(wide).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squashed, want)


def test_normalised_arrays_are_taken_as_they_are():
    floats = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
    for array in (floats, floats.transpose(1, 2, 0), floats[None], floats[None, None]):
        rows = PHI.encode_prompt([-200], [array])["patches"]
        np.testing.assert_array_equal(rows[0], floats.transpose(1, 2, 0).reshape(-1))
    mixed = PHI.encode_prompt([-200, -200], [floats, picture()])["patches"]
    np.testing.assert_allclose(mixed[1], picture().reshape(-1) / 127.5 - 1, atol=1e-6)
    with pytest.raises(BadSample, match=r"\[8,8,3\] or \[3,8,8\]"):
        PHI.encode_prompt([-200], [floats[:, :7]])


@pytest.mark.parametrize("processor", [PHI, LLAMA])
def test_decode_gives_the_answer_alone(processor):
    answer, end = ids(processor, " A red dog.\n"), processor.config.eos_token_id
    assert processor.decode([*answer, end, *answer]) == "A red dog."
    assert processor.decode(np.int32([*answer, 10**6, -1])) == "A red dog."
    assert processor.decode([end]) == processor.decode([]) == ""


@pytest.mark.parametrize(
    "options, peer",
    [
        (dict(image_aspect_ratio="pad", bos=True, model_max_length=None), SiglipImageProcessorPil),
        (dict(fit="crop", image_mean=CLIP_MEAN, image_std=CLIP_STD), CLIPImageProcessorPil),
    ],
)
def test_it_travels_to_a_worker_and_through_files(tmp_path, options, peer):
    processor = PHI.with_options(**options)
    want = processor.encode_prompt("a dog", [picture(0, 20, 9)])
    processor.save_pretrained(tmp_path)
    # Its own file says everything.
    (tmp_path / "config.json").write_text('{"image_tokens": 9, "eos_token_id": 0}')
    copies = pickle.loads(pickle.dumps(processor)), BunnyProcessor.from_pretrained(tmp_path)
    for other in copies:
        assert other.config == processor.config
        got = other.encode_prompt("a dog", [picture(0, 20, 9)])
        for key in want:
            np.testing.assert_array_equal(got[key], want[key])
    about = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert f"{about['image_processor_type']}Pil" == peer.__name__
    row = processor.encode_prompt([-200], [picture()])["patches"].reshape(8, 8, 3)
    theirs = peer.from_pretrained(tmp_path)(Image.fromarray(picture()))["pixel_values"][0]
    np.testing.assert_array_equal(processor.config.normalise(row), theirs.transpose(1, 2, 0))
    text = "USER: hm? ASSISTANT: A dog.<|endoftext|>"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids(PHI, text)


def test_settings_come_from_config_json_and_an_image_processors_file(tmp_path):
    def read(**about):
        (tmp_path / "config.json").write_text(json.dumps(about))
        return BunnyProcessor.from_pretrained(tmp_path).config

    assert read() == ProcessorConfig()
    read_back = read(image_aspect_ratio="pad", tokenizer_model_max_length=512, eos_token_id=[9, 8])
    told = dict(image_aspect_ratio="pad", model_max_length=512, eos_token_id=9)
    assert read_back == ProcessorConfig(**told)
    clip = dict(image_size=336, image_mean=CLIP_MEAN, image_std=CLIP_STD, image_tokens=576)
    for kind, fit in (("clip_vision_model", "crop_down"), ("eva02_clip", "crop")):
        vision = {"model_type": kind, "image_size": 336}
        assert read(vision_config=vision, image_tokens=576) == ProcessorConfig(**clip, fit=fit)
    assert read(use_s2=True, image_aspect_ratio=None) == ProcessorConfig(image_size=1152)
    size = {"height": 28, "width": 28}
    SiglipImageProcessorPil(size=size, image_mean=[0.5, 0.5, 0.4]).save_pretrained(tmp_path)
    own = read(use_s2=True, s2_scales="28,56", image_aspect_ratio="pad")
    assert (own.image_size, own.image_aspect_ratio, own.fit) == (56, "pad", "squash")
    assert own.image_mean == (0.5, 0.5, 0.4)
    with pytest.raises(MMJaxError, match="s2_scales is '28;56'; give sides in pixels"):
        read(use_s2=True, s2_scales="28;56")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"fit": "stretch"}, "fit is 'stretch'; one of crop, crop_down, squash"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; one of pad, square"),
        ({"image_tokens": 0}, "image_tokens is 0"),
        ({"end_token": "<eos>"}, "end_token is '<eos>', which is no special token"),
    ],
)
def test_options_that_no_pipeline_has(options, says):
    with pytest.raises(MMJaxError, match=says):
        PHI.with_options(**options)


def test_the_end_token_may_be_another_than_the_tokenizers():
    tokenizer = build_llama3_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as the file of LLaMA-3-Instruct names another
    processor = BunnyProcessor(SMALL, tokenizer)
    with pytest.raises(MMJaxError, match=r"end_token to '<\|end_of_text\|>'"):
        encode(processor, "bunny_llama_chat", ONE)
    ours = processor.with_options(end_token="<|end_of_text|>")
    example = encode(ours, "bunny_llama_chat", ONE)
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    assert example["tokens"][-1] == end == ours.token_ids()["eos_token_id"]
    assert ours.decode(example["tokens"][example["loss_mask"]]) == "A dog."
    with pytest.raises(MMJaxError, match="no special token 'answer'"):
        encode(PHI, "fuyu_chat", ONE)


class Unread:
    """A source whose records must not be asked for."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise AssertionError("a record was read")


def test_a_template_of_another_tokenizer_stops_before_the_first_record():
    mixture, shape = Mixture.of({"unread": Unread()}), BatchShape(1, 64, 8, 8)
    for template in ("bunny_chat", "bunny_plain"):
        make_loader(mixture, template, PHI, shape)
    says = r"template 'bunny_minicpm_chat': the template ends an answer with </s>, .* bunny_chat"
    with pytest.raises(MMJaxError, match=says):
        make_loader(mixture, "bunny_minicpm_chat", PHI, shape)


def model_config(processor, **changes):
    about = dict(
        vocab_size=512,
        end_token_ids=(processor.config.eos_token_id,),
        image_size=8,
        image_tokens=4,
        image_aspect_ratio="square",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )
    return SimpleNamespace(**{**about, **changes})


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(vocab_size=100), "vocab_size is 100"),
        (dict(end_token_ids=(5, 6)), r"<\|endoftext\|> \(id 0\) and .* eos_token_id is 5, 6"),
        (dict(image_size=28), "pictures of 8 pixels .* takes 28"),
        (dict(image_mean=CLIP_MEAN), "image_mean"),
        (dict(image_tokens=9), "image_tokens is 4 and the model's is 9"),
        (dict(image_aspect_ratio="pad"), "image_aspect_ratio is 'square'"),
    ],
)
def test_a_model_of_other_files_is_refused(changes, says):
    PHI.check(model_config(PHI))
    with pytest.raises(MMJaxError, match=says):
        PHI.check(model_config(PHI, **changes))


def test_a_model_from_nothing_gets_a_tokenizer_of_its_words():
    draft = model_config(
        PHI, image_size=16, image_tokens=9, image_aspect_ratio="pad", max_length=99,
        vision=SimpleNamespace(class_token=False),
    )  # fmt: skip
    processor = BunnyProcessor.for_words(["what colour is it? red blue"], draft)
    made = processor.token_ids()
    assert made["vocab_size"] % 64 == 0 and made["vocab_size"] >= len(processor.tokenizer)
    draft.vocab_size, draft.end_token_ids = made["vocab_size"], (made["eos_token_id"],)
    processor.check(draft)
    one = record(("u", "<image>what colour is it?"), ("a", "red"), images=1)
    example = encode(processor, "bunny_chat", one)
    assert processor.decode(example["tokens"][example["loss_mask"]]) == "red"
    assert (example["visual_index"] == 0).sum() == 9 and example["patches"].shape == (1, 768)
    asked = encode(processor, "bunny_prompt", one)["tokens"].tolist()
    assert asked == example["tokens"][: int(np.argmax(example["loss_mask"]))].tolist()


def test_without_a_tokenizer_ids_serve():
    processor = BunnyProcessor(SMALL)
    example = processor.encode_prompt([3, -200, 4], [picture()])
    assert example["tokens"].tolist() == [3, 0, 0, 0, 0, 4]
    for use in (
        lambda: processor.encode_prompt("a"),
        lambda: processor.decode([1]),
        lambda: processor.encode([Segment("text", "a")], []),
    ):
        with pytest.raises(MMJaxError, match=r"no tokenizer\.json"):
            use()


def test_pictures_that_were_read_before_are_not_read_again():
    example = encode(PHI, "bunny_chat", ONE)
    gone = dataclasses.replace(ONE, images=(b"gone",))
    again = encode(PHI, "bunny_chat", gone, patches=example["patches"])
    assert again["patches"] is example["patches"]
    assert all(np.array_equal(again[name], example[name]) for name in example)
