"""Instruction data against instruct_flamingo's own: tokens, targets, turns, shares, squares."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_language_tokenizers import build_llama_tokenizer, build_neox_tokenizer

from mmjax.data import limits
from mmjax.data.instruct_config import expand_config
from mmjax.data.multiturn import join, up_to
from mmjax.data.resizing import pad_at_random
from mmjax.data.sources import JsonSource
from mmjax.data.templates import TEMPLATES
from mmjax.models.flamingo.processor import FlamingoProcessor, ProcessorConfig
from mmjax.types import Record

FOLDER = Path(os.environ.get("CLEVER_GOLDENS", Path(__file__).parents[1] / "golden"))
GOLDEN = json.loads((FOLDER / "clever_data.json").read_text())
NAMES = {"guanaco": "guanaco_chat", "guanaco-no-prompt": "guanaco_no_prompt_chat"}
BUILDERS = {"neox": build_neox_tokenizer, "llama": build_llama_tokenizer}
SIZE = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The peer's samples, with their pictures."""
    folder = tmp_path_factory.mktemp("instruct")
    for name in "abc":
        Image.new("RGB", (3, 3), "white").save(folder / f"{name}.png")
    (folder / "all.json").write_text(json.dumps(GOLDEN["samples"]))
    return JsonSource(folder / "all.json")


@pytest.fixture(scope="module")
def processors():
    config = ProcessorConfig(image_size=SIZE)
    return {kind: FlamingoProcessor(config, build()) for kind, build in BUILDERS.items()}


def encode(processor, template, record):
    return processor.encode(TEMPLATES[template](record), record.images)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("template", NAMES)
def test_tokens_and_targets_of_one_sample(source, processors, kind, template):
    rows = [row for row in GOLDEN["alone"] if row[:2] == [kind, template]]
    assert len(rows) == len(source) == 9
    for _, _, index, tokens, targets in rows:
        ours = encode(processors[kind], NAMES[template], source[index])
        if kind == "llama":  # the peer puts <s> before the answer too
            again = targets.index(1)
            assert tokens.pop(again) == 1 and targets.pop(again) == 1
        what = GOLDEN["samples"][index]
        assert ours["tokens"].tolist() == tokens, what
        assert ours["loss_mask"].astype(int).tolist() == targets, what


def test_version_1_closes_every_image(source, processors):
    """The peer then wrote <|endofchunk|> behind each <image>, and the rest alike."""
    processor = processors["neox"]
    image, close = processor.config.media_token_id, processor.config.eoc_token_id
    for _, _, index, tokens, _ in (
        row for row in GOLDEN["alone"] if row[:2] == ["neox", "guanaco"]
    ):
        want = [i for token in tokens for i in ([token, close] if token == image else [token])]
        ours = encode(processor, "guanaco_eoc_chat", source[index])
        assert ours["tokens"].tolist() == want
        assert not ours["loss_mask"][ours["tokens"] == close].any()
        prompt = encode(processor, "guanaco_eoc_prompt", source[index])["tokens"]
        assert want[: len(prompt)] == prompt.tolist()


@pytest.mark.parametrize("case", GOLDEN["joined"], ids=lambda c: f"{c['max_img']}-{c['first']}")
def test_turns_behind_a_sample(source, processors, case):
    """Which of the drawn samples follow, their tokens, and the labels of the train step."""
    drawn = (source[i] for i in case["drawn"])
    records = up_to(source[case["first"]], drawn, case["max_img"])
    kept = len(records) - 1
    assert kept == len(case["drawn"]) - (kept < case["turns"])
    record = limits.first_images(join(records), case["max_img"])
    assert len(record.images) == case["images"]
    ours = encode(processors["neox"], NAMES["guanaco-no-prompt"], record)
    ours = processors["neox"].truncate(ours, len(case["tokens"]))
    labels = np.where(ours["loss_mask"], ours["tokens"], -100)
    theirs, image = np.array(case["tokens"]), processors["neox"].config.media_token_id
    surplus = np.flatnonzero(theirs == image)[case["images"] :]
    np.testing.assert_array_equal(ours["tokens"], np.delete(theirs, surplus))
    np.testing.assert_array_equal(labels, np.delete(case["labels"], surplus))


@pytest.mark.parametrize("mode, count, theirs", GOLDEN["shares"])
def test_draws_of_each_dataset(tmp_path, mode, count, theirs):
    """The same but for what rounding leaves: the peer gives all of it to one dataset at random."""
    rows = []
    for i, (size, ratio) in enumerate(zip(GOLDEN["sizes"], GOLDEN["ratios"], strict=True)):
        (tmp_path / f"{i}.json").write_text(json.dumps(GOLDEN["samples"][:1] * size))
        rows.append(dict(dataset_name=str(i), json_path=f"{i}.json", img_dir="", ratio=ratio))
    (tmp_path / "config.json").write_text(json.dumps(rows))
    specs = expand_config(tmp_path / "config.json", num_samples=count, sampling=mode)
    ours = np.array([spec["draws"] for spec in specs.values()])
    assert ours.sum() == sum(theirs) == count
    left = count - np.minimum(ours, theirs).sum()
    assert np.abs(ours - theirs).max() == left and left < len(theirs)


class Always:
    """Draws that always pad, with this colour."""

    def __init__(self, colour):
        self.colour = np.array(colour)

    def random(self):
        return 0.0

    def integers(self, *_):
        return self.colour


@pytest.mark.parametrize("width, height, colour, theirs", GOLDEN["padded"])
def test_padding_to_a_square(width, height, colour, theirs):
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    record = pad_at_random(Record((), (pixels,), {}), Always(colour))
    np.testing.assert_array_equal(record.images[0], theirs)


@pytest.mark.parametrize("marks", GOLDEN["looks"])
def test_version_1_looks_at_the_next_image(processors, marks):
    processor = processors["neox"].with_options(attend_mode="next")
    ids = [processor.config.media_token_id if mark == "i" else 5 for mark in marks]
    pictures = [np.zeros((SIZE, SIZE, 3), np.uint8)] * marks.count("i")
    example = processor.encode_prompt(ids, pictures)
    assert example["visual_index"].tolist() == GOLDEN["looks"][marks]


def test_an_instruction_is_read_the_same_every_time(source, processors):
    """The peer changes its sample in place: each further reading puts the instruction in again."""
    first, second = GOLDEN["legacy"]
    processor = processors["neox"]
    for _ in range(2):
        ours = encode(processor, NAMES["guanaco-no-prompt"], source[len(source) - 1])
        assert ours["tokens"].tolist() == first
    text = processor.tokenizer.decode(second)
    assert len(re.findall("Be short", text)) == 2 and len(second) > len(first)
