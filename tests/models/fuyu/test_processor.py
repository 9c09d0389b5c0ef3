"""Fuyu's token stream: images, prompts, targets, limits, and bad input."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import build_tiny_tokenizer

from mmjax.data.templates import fuyu_prompt, fuyu_spaced_prompt
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.fuyu.image_plan import largest_within
from mmjax.models.fuyu.model import FuyuConfig
from mmjax.models.fuyu.processor import FuyuProcessor, ProcessorConfig
from mmjax.models.fuyu.special_tokens import check_vocabulary
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

TOKENIZER = build_tiny_tokenizer()
SMALL = FuyuProcessor(ProcessorConfig(patch_size=8, max_height=64, max_width=96), TOKENIZER)
IMAGE, NEWLINE, BOS, ANSWER, EOS = (
    TOKENIZER.convert_tokens_to_ids(t)
    for t in ("|SPEAKER|", "|NEWLINE|", "<s>", "<0x04>", "|ENDOFTEXT|")
)


def picture(width, height):
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def rows_of(rows, cols):
    return ([IMAGE] * cols + [NEWLINE]) * rows


def turn(question, answer, images=()):
    return [
        *(Segment("image", index) for index in images),
        Segment("special", "bos"),
        Segment("text", f"User:{question} Assistant:"),
        Segment("special", "answer"),
        Segment("text", answer, True),
        Segment("special", "eos", True),
    ]


def refused(reason, function, *args, **options):
    with pytest.raises(BadSample) as caught:
        function(*args, **options)
    assert caught.value.reason == reason
    return str(caught.value)


def test_golden_sequence_of_the_bus_picture():
    example = FuyuProcessor().encode(
        [Segment("image", 0), Segment("special", "bos")], [picture(640, 400)]
    )
    want = ([71011] * 22 + [71019]) * 14 + [1]
    assert example["tokens"].tolist() == want and len(want) == 323  # of 335, the rest is text
    assert (example["tokens"] == 71011).sum() == 308
    assert example["patches"].shape == (308, 2700) and example["patches"].dtype == np.uint8
    small = FuyuProcessor().encode([Segment("image", 0)], [Image.new("RGB", (64, 300))])
    assert small["tokens"].tolist() == ([71011] * 3 + [71019]) * 10


@pytest.mark.parametrize(
    ("width", "height", "patches", "tokens"),
    [
        (224, 224, 64, 72),
        (448, 448, 225, 240),
        (512, 512, 324, 342),
        (768, 768, 676, 702),
        (1024, 1024, 1225, 1260),
        (1080, 1080, 1296, 1332),
        (1440, 1440, 1296, 1332),
        (1920, 1080, 2304, 2340),
        (2466, 1766, 1836, 1872),
    ],
)
def test_token_budget_of_fuyu_8b(width, height, patches, tokens):
    processor = FuyuProcessor()
    assert processor.image_tokens(width, height) == tokens
    stream = processor.encode([Segment("image", 0)], [np.zeros((height, width, 3), np.uint8)])
    assert (len(stream["tokens"]), len(stream["patches"])) == (tokens, patches)


def test_no_cap_and_token_cap():
    free = FuyuProcessor(ProcessorConfig(max_height=None, max_width=None))
    assert free.image_tokens(3000, 3000) == 100 * 101
    budget = FuyuProcessor(ProcessorConfig(max_image_tokens=240))
    assert budget.image_tokens(448, 448) == 240
    assert budget.image_tokens(449, 449) == budget.image_tokens(448, 448)
    assert 200 <= budget.image_tokens(1920, 1080) <= 240
    assert budget.with_options(max_image_tokens=None).image_tokens(1920, 1080) == 2340
    with pytest.raises(MMJaxError, match="max_image_tokens is 1; give a number from 2 up"):
        ProcessorConfig(max_image_tokens=1)


def test_largest_within_is_the_largest():
    for tokens in (2, 6, 31, 72, 500):
        width, height = largest_within(900, 600, 8, tokens)
        assert -(-height // 8) * (-(-width // 8) + 1) <= tokens
        bigger = (width + 9, height + 6)  # one step of the aspect further
        assert -(-bigger[1] // 8) * (-(-bigger[0] // 8) + 1) > tokens
    assert largest_within(900, 600, 8, 1) is None


def test_padding_is_near_black():
    example = SMALL.encode([Segment("image", 0)], [np.full((9, 8, 3), 255, np.uint8)])
    below = example["patches"][1].reshape(8, 8, 3)
    assert (below[0] == 255).all() and (below[1:] == 1).all()
    np.testing.assert_allclose(SMALL.config.normalise(below[1:]), -0.9922, atol=1e-4)


def test_training_example_has_targets_on_answer_and_eos():
    example = SMALL.encode(turn("what shape?", "a circle", [0]), [picture(24, 16)])
    question, answer = ids("User:what shape? Assistant:"), ids("a circle")
    want = [*rows_of(2, 3), BOS, *question, ANSWER, *answer, EOS]
    assert example["tokens"].tolist() == want
    targets = len(answer) + 1
    assert example["loss_mask"].tolist() == [False] * (len(want) - targets) + [True] * targets
    assert example["positions"].tolist() == list(range(len(want)))
    visual = [0, 1, 2, -1, 3, 4, 5, -1] + [-1] * (len(want) - 8)
    assert example["visual_index"].tolist() == visual
    assert {k: v.dtype.name for k, v in example.items()} == {
        "tokens": "int32",
        "positions": "int32",
        "loss_mask": "bool",
        "visual_index": "int32",
        "patches": "uint8",
    }


def test_every_answer_of_a_conversation_is_supervised():
    second = turn("and now?", "two")[1:]
    example = SMALL.encode([*turn("first?", "one", [0]), *second], [picture(8, 8)])
    targets = example["tokens"][example["loss_mask"]].tolist()
    assert targets == [*ids("one"), EOS, *ids("two"), EOS]


def test_neighbouring_text_is_tokenised_as_one():
    parts = [Segment("text", "what shape"), Segment("text", " does"), Segment("text", " it", True)]
    example = SMALL.encode(parts, [])
    assert example["tokens"].tolist() == ids("what shape does it")
    text = TOKENIZER.decode(example["tokens"][example["loss_mask"]])
    assert text.strip() == "it"


def test_a_token_over_the_border_is_not_a_target():
    processor = FuyuProcessor(SMALL.config, build_word_tokenizer(["abcd"]))
    parts = [Segment("text", "ab"), Segment("text", "cd abcd", True)]
    example = processor.encode(parts, [])
    assert example["loss_mask"].tolist() == [False, True]
    refused("empty_answer", processor.encode, [parts[0], Segment("text", "cd", True)], [])


def test_prompt_layouts():
    first, second = picture(16, 8), picture(8, 16)
    one, two = rows_of(1, 2), rows_of(2, 1)
    encode = SMALL.encode_prompt
    assert encode("yes").get("tokens").tolist() == [BOS, *ids("yes"), ANSWER]
    assert encode("yes")["patches"].shape == (0, 192)
    front = [*one, *two, BOS, *ids("yes"), ANSWER]
    assert encode("yes", [first, second])["tokens"].tolist() == front
    assert encode("<image><image>yes", [first, second])["tokens"].tolist() == front
    marked = encode("yes<image>no<image>", [first, second])
    assert marked["tokens"].tolist() == [BOS, *ids("yes"), *one, *ids("no"), *two, ANSWER]
    assert marked["visual_index"][marked["tokens"] == IMAGE].tolist() == [0, 1, 2, 3]
    assert encode("", [first])["tokens"].tolist() == [*one, BOS, ANSWER]
    for prompt in ("yes<image>", "<image><image><image>"):
        with pytest.raises(MMJaxError, match="marks for 2 images"):
            encode(prompt, [first, second])


@pytest.mark.parametrize("images", [0, 2])
def test_a_string_in_the_words_of_its_template_is_the_prompt_of_training(images):
    """As README says how a model that train.py made is asked."""
    pictures = (picture(16, 8), picture(8, 16))[:images]
    record = Record((Message("user", "what shape?"), Message("assistant", "a circle")), pictures)
    for template, text in (
        (fuyu_prompt, "User:what shape? Assistant:"),
        (fuyu_spaced_prompt, "User: what shape? Assistant:"),
    ):
        want = SMALL.encode(template(record), pictures)
        got = SMALL.encode_prompt(text, pictures)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def test_images_out_of_order_keep_their_own_patches():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    example = SMALL.encode([Segment("image", 1), Segment("image", 0)], [black, white])
    rows = example["visual_index"][example["visual_index"] >= 0]
    assert example["patches"][rows].mean(-1).tolist() == [255, 0]
    refused("image_mismatch", SMALL.encode, [Segment("image", 2)], [black, white])
    refused("image_mismatch", SMALL.encode, [Segment("image", 0)], [black, white])


def test_token_id_prompts_are_used_as_they_are():
    prompt = [5, IMAGE, IMAGE, 6, IMAGE, 9]
    example = SMALL.encode_prompt(prompt, [picture(16, 8), picture(8, 8)])
    assert example["tokens"].tolist() == prompt
    assert example["visual_index"].tolist() == [-1, 0, 1, -1, 2, -1]
    assert not example["loss_mask"].any()
    assert SMALL.encode_prompt(np.array(prompt))["visual_index"].tolist() == [-1] * 6
    message = refused("image_mismatch", SMALL.encode_prompt, prompt, [picture(8, 8)])
    assert "3 image tokens" in message and "1 patches" in message
    with pytest.raises(MMJaxError, match="float64"):
        SMALL.encode_prompt([1.5], [])


def test_processed_floats_are_taken_as_they_are():
    image = picture(20, 12)
    patches = SMALL.encode_prompt("yes", [image])["patches"]
    floats = SMALL.config.normalise(image)
    want = SMALL.config.normalise(patches.reshape(-1, 3)).reshape(patches.shape)
    for given in (floats, floats.transpose(2, 0, 1), floats.transpose(2, 0, 1)[None]):
        example = SMALL.encode_prompt("yes", [given.astype(np.float64)])
        assert example["patches"].dtype == np.float32
        np.testing.assert_array_equal(example["patches"], want)
    prompt = [*rows_of(2, 3), BOS, 9]
    for given in (want, want[None]):
        example = SMALL.encode_prompt(prompt, [given])
        np.testing.assert_array_equal(example["patches"], want)
        assert example["visual_index"].max() == 5
    mixed = SMALL.encode_prompt("yes", [image, floats])
    np.testing.assert_array_equal(mixed["patches"][:6], mixed["patches"][6:])
    refused("image_mismatch", SMALL.encode_prompt, "yes", [want])  # no grid in a text prompt
    refused("bad_image_type", SMALL.encode_prompt, "yes", [np.zeros((5, 6, 7))])


def test_too_long_names_what_would_fit():
    image = picture(90, 50)
    segments = turn("what?", "a circle", [0])
    total = len(SMALL.encode(segments, [image], max_tokens=None)["tokens"])
    assert len(SMALL.encode(segments, [image], max_tokens=total)["tokens"]) == total
    message = refused("too_long", SMALL.encode, segments, [image], max_tokens=total - 40)
    for part in ("90x50", "91 of them", str(total), f"max_tokens = {total - 40} (data.seq_len "):
        assert part in message
    width, height = map(int, message.split("fits is ")[1].split(":")[0].split("x"))
    fits = SMALL.encode(segments, [picture(width, height)], max_tokens=total - 40)
    assert len(fits["tokens"]) <= total - 40
    assert "no room" in refused("too_long", SMALL.encode, segments, [image], max_tokens=20)
    assert "shorten" in refused("too_long", SMALL.encode, turn("what?", "no"), [], max_tokens=5)


def test_too_long_is_told_before_the_pixels_are_read(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(picture(90, 50)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    segments = turn("what?", "a circle", [0])
    assert "cut.png" in refused("too_long", SMALL.encode, segments, [path], max_tokens=50)
    assert "cut.png" in refused("corrupt_image", SMALL.encode, segments, [path])


def test_empty_answers_are_refused():
    for answer in ("", "  \n", "\u200b", " \ufeff\u2060\u00ad"):  # nothing that can be seen
        refused("empty_answer", SMALL.encode, turn("what?", answer, [0]), [picture(8, 8)])
    both = [*turn("a?", "b"), *turn("c?", "")]
    refused("empty_answer", SMALL.encode, both, [])


def test_without_tokenizer_only_strings_fail(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"patch_size": 8, "image_token_id": 77, "eos_token_id": 5}'
    )
    processor = FuyuProcessor.from_pretrained(tmp_path)
    example = processor.encode_prompt([77, 77, 3], [picture(16, 8)])
    assert example["visual_index"].tolist() == [0, 1, -1]
    assert processor.eos_token_id == 5
    for call in (lambda: processor.encode_prompt("hello"), lambda: processor.decode([3])):
        with pytest.raises(MMJaxError, match=r"tokenizer\.json") as caught:
            call()
        assert str(tmp_path) in str(caught.value)


def test_vocabulary_must_match_the_model():
    check_vocabulary(SMALL, len(TOKENIZER), IMAGE)
    check_vocabulary(SMALL, len(TOKENIZER) + 100, IMAGE)
    check_vocabulary(FuyuProcessor(), 10, 5)
    with pytest.raises(MMJaxError, match=f"vocab_size is {len(TOKENIZER) - 1}"):
        check_vocabulary(SMALL, len(TOKENIZER) - 1, IMAGE)
    with pytest.raises(MMJaxError, match="71011"):
        check_vocabulary(SMALL, 262144, 71011)


@pytest.mark.parametrize("change", [{"image_mean": (0.48, 0.46, 0.41)}, {"image_std": 0.27}])
def test_pixels_are_normalised_as_the_model_does(change):
    config = FuyuConfig(patch_size=8, image_token_id=IMAGE)
    SMALL.check(config)
    SMALL.with_options(image_mean=(0.5, 0.5, 0.5)).check(config)
    with pytest.raises(MMJaxError, match=f"{next(iter(change))} .* on the device"):
        SMALL.with_options(**change).check(config)


def test_a_resolution_that_the_box_would_undo_is_refused():
    processor = FuyuProcessor()
    for side in (96, 1080):
        processor.check_resolution(side)
    # A square of 1440 pixels would be shown in 1080.
    for side in (1081, 1440, 1921):
        said = rf"resolution {side}: .* 1080 x 1920 pixels \(height x width\).* None for no limit"
        with pytest.raises(MMJaxError, match=said):
            processor.check_resolution(side)
    processor.with_options(max_height=None).check_resolution(1920)
    processor.with_options(max_height=1440).check_resolution(1440)
    processor.with_options(max_height=None, max_width=None).check_resolution(9999)


def test_settings_of_a_processor_are_named():
    with pytest.raises(MMJaxError, match="no setting 'max_hight'; did you mean 'max_height'"):
        SMALL.with_options(max_hight=64)


def test_worker_imports_neither_jax_nor_torch():
    code = (
        "import sys, mmjax.models.fuyu.processor, mmjax.data.images, mmjax.data.tokenize\n"
        "print([m for m in ('jax', 'flax', 'torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
