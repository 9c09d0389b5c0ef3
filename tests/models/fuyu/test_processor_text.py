"""Coordinates, decoding, tokenizers and the configuration files of Fuyu's processor."""

import dataclasses
import importlib.util
import json
import pickle

import numpy as np
import pytest
from tiny_tokenizer import build_tiny_tokenizer
from tokenizers import normalizers

from mmjax.data.resizing import at_resolution
from mmjax.data.tokenize import (
    encode_text,
    load_tokenizer,
    opening_ids,
    supervised_tokens,
    token_id,
)
from mmjax.data.tokenizers_small import UNDERSCORE, build_word_tokenizer
from mmjax.models.fuyu.coordinates import split_coordinates, to_pixels, to_steps
from mmjax.models.fuyu.processor import FuyuProcessor, ProcessorConfig
from mmjax.types import BadSample, MMJaxError, Record, Segment

TOKENIZER = build_tiny_tokenizer(max_number=64)
SMALL = FuyuProcessor(ProcessorConfig(patch_size=8, max_height=64, max_width=96), TOKENIZER)


def pieces(example):
    return TOKENIZER.convert_ids_to_tokens(example["tokens"].tolist())


def test_boxes_and_points_become_single_number_tokens():
    image = np.zeros((128, 192, 3), np.uint8)  # shrunk by half
    assert SMALL.image_scale(image) == 0.5
    got = pieces(SMALL.encode_prompt("<box>20, 40, 60, 128</box><point>8, 100</point>", [image]))
    tail = ["<0x00>", "5", "10", "15", "32", "<0x01>", "<0x02>", "2", "25", "<0x03>", "<0x04>"]
    assert got[-len(tail) :] == tail
    assert got[-len(tail) - 1] == "<s>"


def test_coordinates_round_half_to_even_as_the_peer_does():
    # x/2 * scale: 2.5 -> 2, 3.5 -> 4, 0.5 -> 0
    assert to_steps([5, 7, 1], 1.0) == [2, 4, 0]
    assert to_steps([100, 33], 0.5) == [25, 8]
    assert to_pixels([25, 8], 0.5) == [100, 32]
    assert to_pixels([10], 0.6) == [32]  # 2 * int(16.67)


def test_text_around_coordinates_is_tokenised_by_itself():
    want = TOKENIZER("the circle is at ", add_special_tokens=False)["input_ids"]
    tokens = SMALL.encode_prompt("the circle is at <point>4, 6</point>?")["tokens"].tolist()
    assert tokens[1 : 1 + len(want)] == want
    assert TOKENIZER.convert_ids_to_tokens(tokens[1 + len(want) :])[:4] == [
        "<0x02>",
        "2",
        "3",
        "<0x03>",
    ]


def test_coordinates_in_answers_are_supervised():
    segments = [
        Segment("text", "where? <box>2, 2, 4, 4</box>"),
        Segment("special", "answer"),
        Segment("text", "at <point>10, 20</point>", True),
        Segment("special", "eos", True),
    ]
    example = SMALL.encode(segments, [])
    targets = TOKENIZER.convert_ids_to_tokens(example["tokens"][example["loss_mask"]].tolist())
    assert targets[-5:] == ["<0x02>", "5", "10", "<0x03>", "|ENDOFTEXT|"]
    assert "<0x00>" not in targets and "<0x04>" not in targets


def test_coordinates_mean_the_image_before_them():
    large, small = np.zeros((128, 192, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    text = "<point>8, 8</point>"
    got = pieces(SMALL.encode_prompt(f"<image>{text}<image>{text}", [large, small]))
    assert [p for p in got if p in {"2", "4"}] == ["2", "2", "4", "4"]


def test_coordinates_mean_the_picture_before_it_was_reduced():
    """In training and in evaluation a size is drawn or asked for before the processor looks."""
    text = "<box>20, 40, 60, 128</box> <point>8, 100</point>"
    picture = np.zeros((128, 192, 3), np.uint8)
    segments = [Segment("image", 0), Segment("text", text, True)]
    want = ["<0x00>", "5", "10", "15", "32", "<0x01>"]

    def encoded(side, processor):
        (image,) = at_resolution(Record((), (picture,)), side).images
        got = pieces(processor.encode(segments, [image]))
        return got[got.index("<0x00>") :], processor.image_scale(image)

    free = SMALL.with_options(max_height=None, max_width=None)
    by_processor, scale = encoded(None, SMALL)
    assert (by_processor[:6], scale) == (want, 0.5)
    assert encoded(96, free) == (by_processor, 0.5)
    assert encoded(144, SMALL) == (by_processor, 0.5)  # by both, one after the other
    assert encoded(48, free)[0][:6] == ["<0x00>", "2", "5", "8", "16", "<0x01>"]


@pytest.mark.parametrize(
    "text",
    [
        "<box>1, 2, 3</box>",
        "<box>a, b, c, d</box>",
        "<point>1, 2, 3, 4</point>",
        "<point></point>",
        "<point>1, nan</point>",
        "<point>1, 9999</point>",
        "<point>-8, 1</point>",
    ],
)
def test_bad_coordinates_are_bad_samples(text):
    with pytest.raises(BadSample) as caught:
        SMALL.encode_prompt(f"see {text}")
    assert caught.value.reason == "bad_coordinates"


def test_unclosed_tags_stay_text():
    assert [span.kind for span in split_coordinates("a <box> b </point>")] == [None]
    assert "<0x00>" not in pieces(SMALL.encode_prompt("a <box> b </point>"))


@pytest.mark.parametrize(
    "text",
    [
        "near the left corner",
        "  spaces  kept ",
        "at <box>10, 20, 30, 40</box>, then <point>4, 6</point> and on",
        "<point>4, 6</point>",
        "ünseen 漢字 🙂\nline",
    ],
)
def test_decode_inverts_encode(text):
    tokens = SMALL.encode([Segment("text", text)], [])["tokens"]
    assert SMALL.decode(tokens) == text


def test_decode_scales_back_to_the_original_image():
    image = np.zeros((128, 192, 3), np.uint8)
    segments = [Segment("image", 0), Segment("text", "<box>20, 40, 60, 80</box>")]
    tokens = SMALL.encode(segments, [image])["tokens"]
    assert SMALL.decode(tokens, scale=0.5) == "<box>20, 40, 60, 80</box>"
    assert SMALL.decode(tokens) == "<box>10, 20, 30, 40</box>"


def test_decode_keeps_the_answer_and_nothing_else():
    segments = [
        Segment("special", "bos"),
        Segment("text", "what? "),
        Segment("special", "answer"),
        Segment("text", "a circle"),
        Segment("special", "eos"),
    ]
    tokens = SMALL.encode(segments, [])["tokens"].tolist()
    assert SMALL.decode([*tokens, 0, 0, *tokens[1:3]]) == "a circle"
    assert SMALL.decode([]) == ""
    assert SMALL.decode([10**6, -1]) == ""  # ids a padded embedding table can produce


def test_decode_survives_broken_coordinates():
    names = ["<0x00>", "5", "6", "<0x01>", "▁the", "<0x02>", "1", "▁the", "<0x03>", "<0x00>"]
    broken = [token_id(TOKENIZER, name) for name in names]
    assert SMALL.decode([i for i in broken if i is not None]).count("<box>") == 0


def test_supervised_tokens_need_their_whole_span():
    spans = np.int32([[0, 2], [2, 5], [5, 6], [6, 6], [4, 6]])
    got = supervised_tokens(spans, [("abcd", False), ("efgh", True)])
    assert got.tolist() == [False, False, True, True, True]
    # White space at the end, of which spans like GPT-NeoX's leave nothing: what it stands behind.
    pieces = [("abcd", False), ("efg ", True)]
    assert supervised_tokens(np.int32([[4, 7], [8, 8]]), pieces).all()
    assert not supervised_tokens(np.int32([[8, 8]]), [*pieces[:1], ("efg ", False)]).any()
    assert supervised_tokens(np.zeros((0, 2), np.int32), []).tolist() == []


@pytest.mark.parametrize("before, behind", [((), ()), ((1,), ()), ((1,), (2,)), ((), (2,))])
def test_a_prompt_opens_with_what_the_tokenizer_puts_before_a_text(before, behind):
    """What it puts behind one, as some do with </s>, opens nothing."""

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [*before, 7, *behind] if add_special_tokens else [7]}

    assert opening_ids(tokenizer, None) == list(before)


def test_word_tokenizer_knows_its_words_and_spells_the_rest():
    tokenizer = build_word_tokenizer(["what colour is it? red", "a\nb"], max_number=12)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 7, 259, 260, 261]) == [
        "<unk>", "<s>", "</s>", "<0x00>", "<0x04>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|",
    ]  # fmt: skip
    assert tokenizer.tokenize("what colour?") == ["▁what", "▁colour", "?"]
    processor = FuyuProcessor(SMALL.config, tokenizer)
    for text in ("what is red?", "unknown words", "a\nb <point>24, 2</point>"):
        assert processor.decode(processor.encode([Segment("text", text)], [])["tokens"]) == text
    again = build_word_tokenizer(["what colour is it? red", "a\nb"], max_number=12)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_without_fuyus_marks_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    )
    with pytest.raises(MMJaxError, match=r"\|SPEAKER\|, \|NEWLINE\|, <0x04>, <s>"):
        FuyuProcessor(ProcessorConfig(), plain)


def test_a_tokenizer_that_was_read_without_its_leading_underscore_is_refused():
    """As transformers 5 reads the tokenizer.model of a Fuyu, where sentencepiece is installed."""
    bare = build_tiny_tokenizer()
    bare.backend_tokenizer.normalizer = normalizers.Replace(" ", UNDERSCORE)
    with pytest.raises(MMJaxError, match=r"without the underscore .* put the tokenizer\.json"):
        FuyuProcessor(ProcessorConfig(), bare)


def test_a_sentencepiece_model_alone_says_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        MMJaxError, match=r"tokenizer\.model: a SentencePiece model, .*tokenizer\.json"
    ):
        load_tokenizer(tmp_path)


def test_a_template_of_another_family_is_named():
    with pytest.raises(MMJaxError, match="no special token 'eoc': .* choose one of Fuyu's"):
        SMALL.encode([Segment("special", "eoc")], [])


def test_broken_tokenizer_file_is_named(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(MMJaxError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_processor_travels_to_a_worker_and_back_from_disk(tmp_path):
    image = np.zeros((20, 20, 3), np.uint8)
    want = SMALL.encode_prompt("is there a circle?", [image])["tokens"]
    copy = pickle.loads(pickle.dumps(SMALL))
    SMALL.save_pretrained(tmp_path)
    for other in (copy, FuyuProcessor.from_pretrained(tmp_path)):
        assert other.config == SMALL.config
        np.testing.assert_array_equal(
            other.encode_prompt("is there a circle?", [image])["tokens"], want
        )


@pytest.mark.parametrize(
    ("file", "data", "want"),
    [
        (
            "preprocessor_config.json",
            {"size": {"height": 64, "width": 96}, "patch_size": 8},
            (8, 64, 96),
        ),
        ("preprocessor_config.json", {"patch_size": {"height": 8, "width": 8}}, (8, 1080, 1920)),
        ("preprocessor_config.json", {"target_height": 300, "target_width": 400}, (30, 300, 400)),
        ("preprocessor_config.json", {"size": 512, "do_resize": True}, (30, 512, 512)),
        (
            "preprocessor_config.json",
            {"do_resize": False, "size": {"height": 9, "width": 9}},
            (30, None, None),
        ),
        (
            "processor_config.json",
            {
                "image_processor": {
                    "size": {"height": 64, "width": 96},
                    "patch_size": {"height": 8, "width": 8},
                },
                "processor_class": "FuyuProcessor",
            },
            (8, 64, 96),
        ),
        ("config.json", {"patch_size": 10}, (10, 1080, 1920)),
    ],
)
def test_hub_files_are_read(tmp_path, file, data, want):
    (tmp_path / file).write_text(json.dumps(data))
    config = ProcessorConfig.from_folder(tmp_path)
    assert (config.patch_size, config.max_height, config.max_width) == want
    assert config == ProcessorConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    bounded = dataclasses.replace(config, max_image_tokens=600)
    assert bounded == ProcessorConfig.from_hf(json.loads(json.dumps(bounded.to_hf())))
    turned = dataclasses.replace(config, transpose=True, max_pixels=None)
    assert turned == ProcessorConfig.from_hf(json.loads(json.dumps(turned.to_hf())))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"patch_size": {"height": 8, "width": 9}}, "square"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"padding_mode": "reflect"}, "reflect"),
        ({"size": "big"}, "big"),
        ({"size": {"longest_edge": 8}}, "it takes height and width"),
        ({"size": {"height": 0, "width": 8}}, "max_height is 0; give a number from 1 up, or None"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"max_image_tokens": 1}, "max_image_tokens is 1; give a number from 2 up"),
        ({"resample": "bilinear"}, "resample is 'bilinear'"),
        ({"padding_value": [1]}, "give a grey level from 0 to 255"),
        ({"image_mean": "x"}, "image_mean is 'x'"),
        ({"image_std": 0}, "cannot be 0"),
        ({"image_processor": "x"}, "expected an object"),
        ({"mmjax": ["transpose"]}, "mmjax = .*expected an object"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(data, match):
    with pytest.raises(MMJaxError, match=match):
        ProcessorConfig.from_hf(data)


def test_null_in_a_file_says_nothing():
    none = dict.fromkeys(("image_processor", "size", "patch_size", "image_mean", "resample"))
    assert ProcessorConfig.from_hf(none | {"rescale_factor": None}) == ProcessorConfig()


def test_json_errors_name_the_file(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(MMJaxError, match=r"preprocessor_config\.json"):
            ProcessorConfig.from_folder(tmp_path)


def test_short_texts_are_remembered_and_long_ones_are_not():
    """Questions repeat; documents do not, and thousands of them would fill a data worker."""
    tokenizer = build_word_tokenizer(["a"])
    short, long = "a " * 10, "a " * 10_000
    for text, same in ((short, True), (long, False)):
        first, again = (encode_text(tokenizer, text)[0] for _ in range(2))
        assert (first is again) is same
        np.testing.assert_array_equal(first, again)
        assert not first.flags.writeable
