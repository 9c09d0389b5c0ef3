"""Our tokens, labels and pixels beside Bunny's own code and transformers' image processors.

Bunny's through what tests/golden/make_bunny_processor_goldens.py recorded; transformers' live, in
their Pillow form, on crops of photographs.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmjax.data.templates import TEMPLATES
from mmjax.data.templates_bunny import ENDS
from mmjax.models.bunny.processor import BunnyProcessor, ProcessorConfig
from mmjax.models.normalisation import CLIP_MEAN, CLIP_STD
from mmjax.types import BadSample, Message, MMJaxError, Record

FOLDER = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(FOLDER))
from make_bunny_processor_goldens import (  # noqa: E402
    CONVERSATIONS,
    LOST,
    MAX_LENGTH,
    NEAR,
    SIDE,
    SIZES,
    TOKENIZERS,
    lengthened,
    picture,
    sources,
)

GOLDEN = json.loads((FOLDER / "bunny_processor.json").read_text())
PIXEL = np.zeros((2, 2, 3), np.uint8)


def processor_of(name):
    about = dict(GOLDEN["tokenizers"][name])
    tokenizer = Tokenizer.from_str(about.pop("file"))
    config = ProcessorConfig(image_size=2, image_tokens=1, model_max_length=MAX_LENGTH)
    return BunnyProcessor(config, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **about))


PROCESSORS = {name: processor_of(name) for name in TOKENIZERS}


def template_of(name):
    version = TOKENIZERS[name][0]
    return "bunny_chat" if version == "bunny" else f"bunny_{version}_chat"


def record_of(name, case):
    """Return a conversation of the golden as a record, with a picture for each of its marks."""
    said = sources(case, PROCESSORS[name].tokenizer.eos_token)
    roles = {"human": "user", "gpt": "assistant"}
    messages = tuple(Message(roles[one["from"]], one["value"]) for one in said)
    marks = sum(m.text.count("<image>") for m in messages)
    return Record(messages, (PIXEL,) * marks)


def encode(name, template, record):
    return PROCESSORS[name].encode(TEMPLATES[template](record), record.images)


def ids_of(example):
    """Return our ids with the peer's -200 where images stand."""
    return np.where(example["visual_index"] >= 0, -200, example["tokens"]).tolist()


def labels_of(example):
    return "".join(".x"[int(one)] for one in example["loss_mask"])


def answers_of(name, example):
    """Return the text of each supervised stretch."""
    cuts = np.flatnonzero(np.diff(np.concatenate([[0], example["loss_mask"], [0]])))
    stretches = (example["tokens"][a:b] for a, b in cuts.reshape(-1, 2))
    return [PROCESSORS[name].tokenizer.decode(ids) for ids in stretches]


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_tokens_and_labels_are_those_of_bunnys_own_preprocessing(name):
    assert set(GOLDEN["cases"][name]) == set(CONVERSATIONS)
    for case, want in GOLDEN["cases"][name].items():
        example = encode(name, template_of(name), record_of(name, CONVERSATIONS[case]))
        assert ids_of(example) == want["ids"], case
        assert labels_of(example) == want["labels"], case
        assert "x" in want["labels"], case


@pytest.mark.parametrize("name", GOLDEN["plain"])
def test_pretraining_supervises_caption_and_newline(name):
    want = GOLDEN["plain"][name]
    example = encode(name, "bunny_plain", record_of(name, CONVERSATIONS["single"]))
    assert ids_of(example) == want["ids"]
    assert labels_of(example) == want["labels"]


@pytest.mark.parametrize("version", GOLDEN["strings"])
def test_strings_are_the_peers(version):
    name = "bunny" if version in ("bunny", "default") else f"bunny_{version}"
    says = [("user", "<image>\nQ1"), ("assistant", "A1"), ("user", "Q2")]
    record = Record(tuple(Message(*one) for one in says), (PIXEL,))
    segments = TEMPLATES[f"{name}_prompt"](record)
    text = "".join("<image>" if s.kind == "image" else str(s.value) for s in segments[1:])
    assert text == GOLDEN["strings"][version]
    assert not any(s.loss for s in segments)
    record = Record((*record.messages, Message("assistant", "A2")), record.images)
    ends = [s for s in TEMPLATES[f"{name}_chat"](record) if s.kind == "special"][1:]
    assert [s.value for s in ends] == [ENDS[name]] * 2 and all(s.loss for s in ends)


def lost_by_peer(name, case):
    return "x" not in GOLDEN["lost"][name][case]["labels"]


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_what_the_peer_masks_is_trained_on_or_refused_by_name(name):
    """The table of docs/bunny.md, row by row."""
    end = PROCESSORS[name].tokenizer.eos_token
    template = template_of(name)
    assert set(LOST) <= set(GOLDEN["lost"][name])

    def ours(case):
        assert lost_by_peer(name, case)
        return encode(name, template, record_of(name, LOST[case]))

    def squeezed(case):
        return [text.replace(" ", "") for text in answers_of(name, ours(case))]

    assert squeezed("role in an answer") == [f"OneASSISTANT:two.{end}", f"Three.{end}"]
    assert squeezed("role in a question") == [f"Ahelper.{end}"]
    for case, reason in (("end in an answer", "end_mark"), ("no last answer", "empty_answer")):
        with pytest.raises(BadSample) as caught:
            ours(case)
        assert caught.value.reason == reason

    # An empty answer: the peer leaves out its end, so that the next question follows "ASSISTANT:".
    text = PROCESSORS[name].tokenizer.decode(
        [i for i in GOLDEN["lost"][name]["an empty answer"]["ids"] if i >= 0]
    )
    assert "ASSISTANT:USER:" in text.replace(" ", "")
    with pytest.raises(BadSample, match="empty"):
        encode(name, template, record_of(name, LOST["an empty answer"]))

    # A question that ends with the role: the peer splits there, and learns the next role's name.
    peer = GOLDEN["lost"][name]["question ends in the role"]
    example = encode(name, template, record_of(name, LOST["question ends in the role"]))
    assert ids_of(example) == peer["ids"]
    learnt = [i for i, label in zip(peer["ids"], peer["labels"], strict=True) if label == "x"]
    assert PROCESSORS[name].tokenizer.decode(learnt).replace(" ", "") == f"ASSISTANT:Adog.{end}"
    assert [text.replace(" ", "") for text in answers_of(name, example)] == [f"Adog.{end}"]

    # Two images in one message: the peer shows the first alone.
    assert GOLDEN["lost"][name]["two in a message"]["ids"].count(-200) == 1
    example = encode(name, template, record_of(name, LOST["two in a message"]))
    assert example["visual_index"][example["visual_index"] >= 0].tolist() == [0, 1]
    assert len(example["patches"]) == 2


def test_turns_that_another_tokenization_joins_are_trained_on():
    """A tokenizer that writes `</s>USER` otherwise than `USER`: the peer counts other tokens."""
    name = "minicpm_first"
    assert lost_by_peer(name, "several")
    example = encode(name, template_of(name), record_of(name, CONVERSATIONS["several"]))
    assert ids_of(example) == GOLDEN["lost"][name]["several"]["ids"]
    want = [f"{CONVERSATIONS['several']['texts'][i]}</s>" for i in (1, 3, 5)]
    assert [text.strip() for text in answers_of(name, example)] == want


def test_a_sample_a_little_over_the_limit_is_trained_on():
    """Where pad is <eos>, the peer compares a length without ends with the limit."""
    peer = GOLDEN["lost"]["phi"][NEAR]
    assert lost_by_peer("phi", NEAR) and len(peer["ids"]) == MAX_LENGTH
    example = encode("phi", "bunny_chat", record_of("phi", lengthened(peer["words"])))
    assert MAX_LENGTH < len(example["tokens"]) <= MAX_LENGTH + 3
    cut = PROCESSORS["phi"].truncate(example, 10 * MAX_LENGTH)
    assert cut["tokens"].tolist() == peer["ids"]
    answers = answers_of("phi", cut)
    assert answers[:2] == [" Two.<|endoftext|>", " Four.<|endoftext|>"]
    assert answers[2].startswith(" dog dog") and answers[2].endswith(" dog")


def test_the_wrong_template_is_an_error_and_not_a_warning_for_each_sample():
    assert lost_by_peer("llama3_as_bunny", "several")
    says = (
        r"answer with <\|end_of_text\|>, which is no special token .* ends an answer with "
        r"<\|endoftext\|> \(id 0\), and templates that fit it: bunny_chat, bunny_phi3_chat"
    )
    record = record_of("phi", CONVERSATIONS["several"])
    with pytest.raises(MMJaxError, match=says):
        encode("phi", "bunny_llama_chat", record)
    with pytest.raises(MMJaxError, match=r"<\|endoftext\|> \(id 0\) .* fit it: bunny_llama_chat"):
        encode("llama3_as_bunny", "bunny_chat", record)


# ---- pixels ------------------------------------------------------------------------------------

SIGLIP = {}
CLIP = dict(fit="crop_down", image_mean=CLIP_MEAN, image_std=CLIP_STD)


def pixels(image, side, **options):
    """Our normalised pixels of one picture, float32[3,side,side]."""
    processor = BunnyProcessor(ProcessorConfig(image_size=side, image_tokens=1, **options))
    rows = processor.encode_prompt([-200], [image])["patches"]
    assert rows.dtype == np.uint8 and rows.shape == (1, side * side * 3)
    return processor.config.normalise(rows.reshape(side, side, 3)).transpose(2, 0, 1)


@pytest.mark.parametrize("kind, options", [("siglip", SIGLIP), ("clip", CLIP)])
def test_padded_pixels_are_those_of_bunnys_own_process_images(kind, options):
    with np.load(FOLDER / "bunny_processor.npz") as arrays:
        for width, height in SIZES:
            got = pixels(picture(width, height), SIDE, image_aspect_ratio="pad", **options)
            np.testing.assert_array_equal(got, arrays[f"{kind}/{width}x{height}"])


# Crops of two photographs: width, height, mode.
CROPS = [
    *((1, 427, "RGB"), (600, 1, "RGB"), (333, 77, "RGB"), (77, 333, "RGB"), (640, 31, "RGB")),
    *((31, 427, "RGB"), (384, 384, "RGB"), (112, 112, "RGB"), (113, 112, "RGB"), (111, 3, "RGB")),
    *((640, 427, "L"), (200, 199, "L"), (50, 427, "RGBA"), (321, 123, "RGBA"), (97, 101, "P")),
    *((300, 20, "P"), (2, 2, "RGB"), (427, 427, "RGB"), (639, 426, "RGB"), (13, 17, "LA")),
]


@pytest.fixture(scope="module")
def photographs():
    from sklearn.datasets import load_sample_image

    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    boxes = ((7 * i % (641 - w), 5 * i % (428 - h), w, h) for i, (w, h, _) in enumerate(CROPS))
    return [
        photos[i % 2].crop((x, y, x + w, y + h)).convert(CROPS[i][2])
        for i, (x, y, w, h) in enumerate(boxes)
    ]


def test_siglip_squashes_as_transformers_does(photographs):
    peer = SiglipImageProcessorPil(
        size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    assert len(photographs) == 20
    for image in photographs:
        np.testing.assert_array_equal(pixels(image, 384), peer(image)["pixel_values"][0])


@pytest.mark.parametrize("pad", [False, True])
def test_clip_crops_and_pads_as_transformers_does(photographs, pad):
    """LLaVA's processor is CLIP's, which pads to a square of the mean colour first if asked to."""
    square = {"height": 112, "width": 112}
    settings = dict(size={"shortest_edge": 112}, crop_size=square)
    if pad:
        peer = LlavaImageProcessorPil(**settings, do_pad=True)
    else:
        peer = CLIPImageProcessorPil(**settings)
    mode = "pad" if pad else "square"
    for image in photographs:
        want = peer(image)["pixel_values"][0]
        np.testing.assert_array_equal(pixels(image, 112, image_aspect_ratio=mode, **CLIP), want)


def test_siglip_pads_as_transformers_does(photographs):
    """With S2 too: the side is the largest scale's, here 90."""
    square = {"height": 90, "width": 90}
    peer = LlavaImageProcessorPil(
        size=square, do_center_crop=False, do_pad=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    for image in photographs:
        want = peer(image)["pixel_values"][0]
        np.testing.assert_array_equal(pixels(image, 90, image_aspect_ratio="pad"), want)
