"""Flamingo's processor: tokens of the peers' strings, targets, media and what looks at them."""

import copy
import dataclasses
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_language_tokenizers import build_llama_tokenizer, build_neox_tokenizer

from mmjax.data.templates import TEMPLATES
from mmjax.data.templates_flamingo import GUANACO_SYSTEM
from mmjax.models.flamingo.processor import FlamingoProcessor, ProcessorConfig
from mmjax.models.normalisation import CLIP_MEAN, CLIP_STD
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

SMALL = ProcessorConfig(image_size=8, answer_token=True)
BUILDERS = {
    "neox": build_neox_tokenizer,
    "llama": build_llama_tokenizer,
    "llama_first": lambda: build_llama_tokenizer(first_only=True),
}
TOKENIZERS = {name: build() for name, build in BUILDERS.items()}
PROCESSORS = {name: FlamingoProcessor(SMALL, t) for name, t in TOKENIZERS.items()}
NEOX = PROCESSORS["neox"]
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def picture(width=8, height=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def record(*turns, images=0):
    messages = tuple(Message(ROLES[role], text) for role, text in turns)
    return Record(messages, tuple(picture(seed=i) for i in range(images)), {"id": "7"})


def encode(processor, template, one, **options):
    return processor.encode(TEMPLATES[template](one), one.images, **options)


def targets(processor, example):
    return processor.tokenizer.decode(example["tokens"][example["loss_mask"]])


TWO = record(
    ("u", "<image>\nWhat colour is it?"),
    ("a", "A red circle."),
    ("u", "<image>And this?"),
    ("a", "Blue, naïve 漢."),
    images=2,
)
EOC = "<|endofchunk|>"
STRINGS = {
    "otter": f"<image>User: What colour is it? GPT:<answer> A red circle.{EOC}"
    f"<image>User: And this? GPT:<answer> Blue, naïve 漢.{EOC}",
    "otter_tight": f"<image>User:What colour is it? GPT:<answer>A red circle.{EOC}"
    f"<image>User:And this? GPT:<answer>Blue, naïve 漢.{EOC}",
    "open_flamingo_caption": f"<image>Output:A red circle.{EOC}\n"
    f"<image>Output:Blue, naïve 漢.{EOC}",
    "open_flamingo_vqa": f"<image>Question:What colour is it? Short answer:A red circle.{EOC}\n"
    f"<image>Question:And this? Short answer:Blue, naïve 漢.{EOC}",
}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("name", STRINGS)
def test_tokens_are_the_tokenizers_own_of_the_peers_string(kind, name):
    processor = PROCESSORS[kind]
    close = processor.tokenizer.eos_token * name.startswith("otter")
    want = processor.tokenizer(STRINGS[name] + close)["input_ids"]
    example = encode(processor, f"{name}_chat", TWO)
    assert example["tokens"].tolist() == want
    assert example["tokens"].dtype == np.int32 and example["loss_mask"].dtype == bool
    np.testing.assert_array_equal(example["positions"], np.arange(len(want)))
    prompt = encode(processor, f"{name}_prompt", TWO)
    asked = STRINGS[name][: STRINGS[name].rindex("Blue")].removesuffix(" ")
    assert prompt["tokens"].tolist() == processor.tokenizer(asked)["input_ids"]
    assert not prompt["loss_mask"].any()
    # And a string prompt, with the marks inside, is the same prompt.
    again = processor.encode_prompt(asked, TWO.images)
    for key in prompt:
        np.testing.assert_array_equal(again[key], prompt[key])


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("name", ["otter", "open_flamingo_vqa"])
def test_targets_are_the_answers_and_their_ends(kind, name):
    processor = PROCESSORS[kind]
    got = targets(processor, encode(processor, f"{name}_chat", TWO)).replace(" ", "")
    close = processor.tokenizer.eos_token * (name == "otter")
    assert got == f"Aredcircle.{EOC}Blue,naïve漢.{EOC}{close}"


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("template", ["guanaco", "guanaco_no_prompt"])
def test_guanaco_tokenises_prompts_and_answers_apart_with_one_bos(kind, template):
    """As instruct_flamingo does, but for the <s> that it puts before every part of LLaMA's."""
    processor = PROCESSORS[kind]
    system = f"{GUANACO_SYSTEM}\n" if template == "guanaco" else ""
    parts = [
        (f"{system}### Human: <image>\nWhat colour is it?\n### Assistant: ", False),
        ("A red circle.", True),
        ("\n### Human: <image>And this?\n### Assistant: ", False),
        ("Blue, naïve 漢.", True),
    ]
    want, loss = [], []
    for i, (part, supervised) in enumerate(parts):
        ids = processor.tokenizer(part, add_special_tokens=i == 0)["input_ids"]
        ids += [processor.tokenizer.eos_token_id] * supervised
        want, loss = want + ids, loss + [supervised] * len(ids)
    example = encode(processor, f"{template}_chat", TWO)
    assert example["tokens"].tolist() == want
    assert example["loss_mask"].tolist() == loss
    assert want.count(processor.tokenizer.bos_token_id) == (2 if kind == "neox" else 1)
    prompt = encode(processor, f"{template}_prompt", TWO)
    assert prompt["tokens"].tolist() == want[: len(prompt["tokens"])]
    assert len(want) - len(prompt["tokens"]) == loss[::-1].index(False)


@pytest.mark.parametrize("kind", BUILDERS)
def test_pretraining_learns_all_but_the_image_or_what_follows_it(kind):
    processor = PROCESSORS[kind]
    tokenizer, end = processor.tokenizer, processor.tokenizer.eos_token
    caption = encode(processor, "laion_caption", record(("a", "A red dog."), images=1))
    want = tokenizer(f"<image>A red dog.{EOC}{end}")["input_ids"]
    assert caption["tokens"].tolist() == want
    first = want.index(processor.config.media_token_id)
    np.testing.assert_array_equal(np.flatnonzero(~caption["loss_mask"]), np.arange(first + 1))
    document = record(("u", "Two cats. <image> On a sofa. <image> A dog."), images=2)
    example = encode(processor, "interleaved", document)
    whole = f"Two cats.<image>On a sofa.{EOC}<image>A dog.{EOC}{end}"
    assert example["tokens"].tolist() == tokenizer(whole)["input_ids"]
    assert targets(processor, example).replace(" ", "") == f"Onasofa.{EOC}Adog.{EOC}"


def test_missing_tokens_are_added_in_the_peers_order_and_said_once(caplog):
    tokenizer = build_neox_tokenizer()
    size = len(tokenizer)
    with caplog.at_level(logging.INFO):
        plain = FlamingoProcessor(ProcessorConfig(), tokenizer)
        assert caplog.messages == [
            f"added to the tokenizer: <|endofchunk|> = {size}, <image> = {size + 1}, "
            f"<PAD> = {size + 2}"
        ]
        assert plain.config.answer_token_id is None and len(tokenizer) == size + 3
        otter = plain.with_options(answer_token=True)  # OpenFlamingo's files, trained on as Otter
        assert otter.config.answer_token_id == size + 3 and len(caplog.messages) == 2
        FlamingoProcessor(otter.config, tokenizer)
        assert len(caplog.messages) == 2
    fresh = FlamingoProcessor(ProcessorConfig(answer_token=True), build_llama_tokenizer())
    ids = fresh.token_ids()
    names = ("eoc_token_id", "media_token_id", "answer_token_id", "pad_token_id")
    first = ids["eoc_token_id"]
    assert [ids[name] for name in names] == [first, first + 1, first + 2, first + 3]  # Otter's
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (1, 2)
    assert ids["vocab_size"] % 64 == 0 and ids["vocab_size"] >= len(fresh.tokenizer)
    assert "answer_token_id" not in plain.token_ids()


def test_a_token_added_later_is_no_longer_spelt_out():
    plain = FlamingoProcessor(ProcessorConfig(image_size=8), build_neox_tokenizer())
    spelt = plain.encode_prompt("GPT:<answer>")["tokens"]
    known = plain.with_options(answer_token=True).encode_prompt("GPT:<answer>")["tokens"]
    assert len(known) < len(spelt) and known[-1] == len(plain.tokenizer) - 1
    with pytest.raises(MMJaxError, match="answer_token=True adds Otter's"):
        other = FlamingoProcessor(ProcessorConfig(image_size=8), build_neox_tokenizer())
        encode(other, "otter_chat", TWO)


@pytest.mark.parametrize("bos, want", [(None, [0, 1, 1]), (True, [1, 1, 1]), (False, [0, 0, 0])])
def test_bos_follows_the_tokenizer_or_the_option(bos, want):
    for count, processor in zip(want, PROCESSORS.values(), strict=True):
        other = processor.with_options(bos=bos)
        bare = processor.tokenizer("a dog", add_special_tokens=False)["input_ids"]
        got = other.encode_prompt("a dog")["tokens"].tolist()
        assert got == [processor.tokenizer.bos_token_id] * count + bare


LOOKS = {  # tokens as . for text and i for <image>
    ("previous", "..i.i..i."): [-1, -1, 0, 0, 1, 1, 1, 2, 2],
    ("next", "..i.i..i."): [0, 0, 0, 1, 1, 2, 2, 2, -1],
    ("previous", "..."): [-1, -1, -1],
    ("next", "..."): [-1, -1, -1],
    ("next", "i"): [0],
}


@pytest.mark.parametrize("mode, tokens", LOOKS)
def test_text_looks_at_the_image_before_or_behind_it(mode, tokens):
    processor = NEOX.with_options(attend_mode=mode)
    media = processor.config.media_token_id
    ids = [media if c == "i" else 5 for c in tokens]
    example = processor.encode_prompt(ids, [picture()] * tokens.count("i"))
    assert example["tokens"].tolist() == ids
    assert example["visual_index"].tolist() == LOOKS[mode, tokens]
    assert example["visual_index"].dtype == np.int32


def test_at_random_half_of_the_training_samples_look_ahead_and_no_question():
    processor = NEOX.with_options(attend_mode="random")
    one, ahead = record(("u", "<image>hm?"), ("a", "A dog."), images=1), []
    rng = np.random.default_rng(0)
    for _ in range(60):
        example = encode(processor.drawn(rng), "otter_chat", one)
        ahead.append(example["visual_index"].tolist() == [0] + [-1] * (len(example["tokens"]) - 1))
        assert ahead[-1] or (example["visual_index"] == 0).all()
    assert 15 < sum(ahead) < 45
    for asked in (processor.encode_prompt("<image>User: hm?", [picture()]),
                  encode(processor, "otter_prompt", one)):  # fmt: skip
        assert (asked["visual_index"] == 0).all()
    assert NEOX.drawn(rng) is NEOX


def test_an_image_is_one_row_of_grey_levels():
    pixels = [picture(8, 8, seed) for seed in range(2)]
    example = NEOX.encode_prompt("<image>a<image>", pixels)
    assert example["patches"].shape == (2, 192) and example["patches"].dtype == np.uint8
    np.testing.assert_array_equal(example["patches"].reshape(2, 8, 8, 3), pixels)
    assert NEOX.encode_prompt("a dog")["patches"].shape == (0, 192)
    front = NEOX.encode_prompt("a dog", pixels)  # without marks they stand in front
    assert front["visual_index"].tolist()[:3] == [0, 1, 1]


def test_images_stand_where_the_template_puts_them():
    segments = [Segment("image", 1), Segment("text", "a"), Segment("image", 0)]
    example = NEOX.encode(segments, [picture(seed=0), picture(seed=1)])
    np.testing.assert_array_equal(example["patches"][0], picture(seed=1).reshape(-1))


def test_normalised_arrays_are_taken_as_they_are():
    floats = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
    want = floats.transpose(1, 2, 0).reshape(-1)
    for array in (
        floats,
        floats.transpose(1, 2, 0),
        floats[None],
        floats[None, None].astype(float),
    ):
        rows = NEOX.encode_prompt("<image>", [array])["patches"]
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows[0], want)
    mixed = NEOX.encode_prompt("<image><image>", [floats, picture()])["patches"]
    levels = (picture() / np.float32(255) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    np.testing.assert_allclose(mixed[1], levels.reshape(-1), rtol=1e-6)
    with pytest.raises(BadSample, match=r"\[8,8,3\] or \[3,8,8\].* got \[3, 9, 8\]"):
        NEOX.encode_prompt("<image>", [np.zeros((3, 9, 8), np.float32)])


def test_a_video_is_one_medium_of_so_many_frames():
    processor = NEOX.with_options(frames=2)
    first, second = picture(seed=1), picture(seed=2)
    for video in ([first, second], (first, Image.fromarray(second)), np.stack([first, second])):
        example = processor.encode_prompt("<image>what?", [video])
        np.testing.assert_array_equal(example["patches"].reshape(1, 2, 8, 8, 3), [[first, second]])
    floats = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    rows = processor.encode_prompt("<image>", [floats])["patches"].reshape(2, 8, 8, 3)
    np.testing.assert_array_equal(rows, floats.transpose(0, 2, 3, 1))
    half = processor.encode_prompt("<image>", [[floats[0], first]])["patches"]
    np.testing.assert_array_equal(half.reshape(2, 8, 8, 3)[0], floats[0].transpose(1, 2, 0))
    with pytest.raises(BadSample, match="image 1 holds 1 frames and the model takes 2") as caught:
        processor.encode_prompt("<image><image>", [[first, second], first])
    assert caught.value.reason == "frame_count"
    with pytest.raises(BadSample, match="holds 2 frames and the model takes 1"):
        NEOX.encode_prompt("<image>", [[first, second]])


def test_marks_and_images_that_do_not_match_are_told_with_both_counts():
    with pytest.raises(MMJaxError, match=r"2 <image> mark\(s\) and there are 1 .*more marks"):
        NEOX.encode_prompt("<image>a<image>", [picture()])
    media = NEOX.config.media_token_id
    with pytest.raises(BadSample, match=r"1 <image> mark\(s\) and there are 2 .*without marks"):
        NEOX.encode_prompt([5, media], [picture()] * 2)
    with pytest.raises(BadSample, match=r"0 <image> mark\(s\) and there are 1"):
        NEOX.encode([Segment("text", "a")], [picture()])
    smuggled = [Segment("image", 0), Segment("text", "a <image> b")]
    with pytest.raises(BadSample, match="text itself holds <image>: 2 marks for 1") as caught:
        NEOX.encode(smuggled, [picture()])
    assert caught.value.reason == "image_mismatch"
    with pytest.raises(MMJaxError, match="integer token ids, not float64"):
        NEOX.encode_prompt([0.5])


def test_samples_that_cannot_be_used_are_bad():
    broken = record(("u", "<image>q"), ("a", "A dog."), images=1)
    broken = Record(broken.messages, (b"no image",))
    with pytest.raises(BadSample, match="13 tokens, above max_tokens = 5") as caught:
        encode(NEOX, "otter_chat", broken, max_tokens=5)
    assert caught.value.reason == "too_long"  # before the image is looked at
    with pytest.raises(BadSample) as caught:
        encode(NEOX, "otter_chat", broken)
    assert caught.value.reason == "corrupt_image"
    with pytest.raises(BadSample, match="an answer is empty"):
        NEOX.encode([Segment("text", " ", True), Segment("special", "eoc", True)], [])
    with pytest.raises(MMJaxError, match="no special token 'newline'"):
        NEOX.encode([Segment("special", "newline")], [])


@pytest.mark.parametrize("kind", BUILDERS)
def test_decode_gives_the_answer_alone(kind):
    processor = PROCESSORS[kind]
    example = encode(processor, "otter_chat", TWO)
    assert processor.decode(example["tokens"]).strip() == "Blue, naïve 漢."
    answer = processor.tokenizer(" A dog.", add_special_tokens=False)["input_ids"]
    config = processor.config
    for end in (config.eoc_token_id, config.eos_token_id):
        text = processor.decode([*answer, end, *answer, config.pad_token_id])
        assert text.strip() == "A dog."
    assert processor.decode([]) == processor.decode([10**6, -1, config.media_token_id]) == ""


def test_without_a_tokenizer_ids_serve():
    processor = FlamingoProcessor(ProcessorConfig(image_size=8, media_token_id=7))
    example = processor.encode_prompt([3, 7, 4], [picture()])
    assert example["visual_index"].tolist() == [-1, 0, 0]
    for use in (lambda: processor.encode_prompt("a"), lambda: processor.decode([1])):
        with pytest.raises(MMJaxError, match=r"no tokenizer\.json"):
            use()


def model_config(processor, **changes):
    fields = dict(
        vocab_size=512,
        media_token_id=processor.config.media_token_id,
        answer_token_id=processor.config.answer_token_id,
        vision=SimpleNamespace(image_size=8),
        perceiver=SimpleNamespace(max_frames=None, max_media=None),
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(vocab_size=100), "vocab_size is 100; use the tokenizer"),
        (dict(vocab_size=100, answer_token_id=None), "answer_token=True adds <answer>, which the"),
        (dict(media_token_id=5), "media_token_id is 5"),
        (dict(vision=SimpleNamespace(image_size=14)), "pictures of 8 pixels .* takes 14"),
        (dict(image_std=(0.5, 0.5, 0.5)), "image_std"),
    ],
)
def test_a_model_of_other_files_is_refused(changes, says):
    NEOX.check(model_config(NEOX))
    with pytest.raises(MMJaxError, match=says):
        NEOX.check(model_config(NEOX, **changes))


def test_media_of_more_frames_than_have_embeddings_are_refused():
    model = model_config(NEOX, perceiver=SimpleNamespace(max_frames=3, max_media=None))
    NEOX.with_options(frames=3).check(model)
    with pytest.raises(MMJaxError, match="media of 4 frames and the model has embeddings of 3"):
        NEOX.with_options(frames=4).check(model)


def test_more_media_than_have_embeddings_are_bad():
    model = model_config(NEOX, perceiver=SimpleNamespace(max_frames=None, max_media=2))
    with pytest.raises(MMJaxError, match="max_media is None and the model has embeddings of 2"):
        NEOX.check(model)
    two, one = NEOX.with_options(max_media=2), NEOX.with_options(max_media=1)
    two.check(model)
    assert len(encode(two, "otter_chat", TWO)["patches"]) == 2
    for use in (
        lambda: encode(one, "otter_chat", TWO),
        lambda: one.encode_prompt("<image><image>", TWO.images),
    ):
        with pytest.raises(BadSample, match="2 media and the model has embeddings of 1") as caught:
            use()
        assert caught.value.reason == "too_many_media"


def test_a_model_from_nothing_gets_a_tokenizer_of_its_words():
    config = model_config(NEOX, image_mean=(0.5, 0.5, 0.5))
    processor = FlamingoProcessor.for_words(["what colour is it? red blue"], config)
    assert (processor.config.image_size, processor.config.image_mean) == (8, (0.5, 0.5, 0.5))
    one = record(("u", "<image>what colour is it?"), ("a", "red"), images=1)
    for template in ("otter_chat", "guanaco_chat", "open_flamingo_vqa_chat"):
        example = encode(processor, template, one)
        assert processor.decode(example["tokens"][example["loss_mask"]]).strip() == "red"
    ids = processor.token_ids()
    processor.check(model_config(processor, image_mean=(0.5, 0.5, 0.5), **{
        k: ids[k] for k in ("vocab_size", "media_token_id")
    }))  # fmt: skip


def test_it_travels_to_a_worker_and_back_from_disk(tmp_path):
    processor = NEOX.with_options(frames=2, attend_mode="next", bos=True)
    want = processor.encode_prompt("<image>a dog", [[picture(20, 9)] * 2])
    processor.save_pretrained(tmp_path)
    copies = [pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)]
    for other in (*copies, FlamingoProcessor.from_pretrained(tmp_path)):
        assert other.config == processor.config
        got = other.encode_prompt("<image>a dog", [[picture(20, 9)] * 2])
        for key in want:
            np.testing.assert_array_equal(got[key], want[key])


def test_pictures_that_were_read_before_are_not_read_again():
    processor = next(iter(PROCESSORS.values()))
    example = encode(processor, "otter_chat", TWO)
    gone = dataclasses.replace(TWO, images=(b"gone", b"gone"))
    again = encode(processor, "otter_chat", gone, patches=example["patches"])
    assert again["patches"] is example["patches"]
    assert all(np.array_equal(again[name], example[name]) for name in example)
