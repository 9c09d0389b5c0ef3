"""Conversations at mixed resolutions, from record to loss: what is supervised, and that packing
changes nothing."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from mmjax.data.packing import BatchShape, pack
from mmjax.data.resizing import at_resolution, list_resolutions, squash_first
from mmjax.data.templates import get_template
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.fuyu.processor import FuyuProcessor, ProcessorConfig
from mmjax.train.loss import loss_sum
from mmjax.types import Message, Record
from tests import tiny

TEXTS = ("what shape is this? and that one? is it red?", "a circle", "a blue square", "no")
TOKENIZER = build_word_tokenizer([*TEXTS, "User: Assistant: GPT: [INST] [/INST]"])
PROCESSOR = FuyuProcessor(ProcessorConfig(patch_size=4), TOKENIZER)
BOA, EOS = PROCESSOR.specials["answer"], PROCESSOR.eos_token_id
CHATS = ("fuyu_chat", "simple_chat", "llama2_chat", "idefics_chat", "fuyu_spaced_chat")
ANSWERS = ("a circle", "a blue square", "no")
SHAPE = BatchShape(1, 224, 96, 48)


def talk(turns, *sizes):
    """A conversation of some turns about pictures of some sizes, the second picture in turn two."""
    rng = np.random.default_rng(turns)
    questions = ("what shape is this?", "and that one?", "is it red?")
    if len(sizes) == 2:
        questions = (f"<image>\n{questions[0]}", f"<image>\n{questions[1]}", questions[2])
    pairs = zip(questions[:turns], ANSWERS, strict=False)
    roles = itertools.cycle(("user", "assistant"))
    messages = tuple(map(Message, roles, itertools.chain(*pairs)))
    return Record(messages, tuple(rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in sizes))


def encode(template, record):
    return PROCESSOR.encode(get_template(template)(record), record.images)


def words(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def supervised(example):
    """The targets as texts: runs of them, cut behind each eos."""
    runs, tokens = [[]], example["tokens"].tolist()
    for token, wanted in zip(tokens, example["loss_mask"], strict=True):
        if wanted:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_every_answer_is_supervised_and_nothing_else(template, turns):
    example = encode(template, talk(turns, (12, 8), *([(6, 14)] if turns > 1 else [])))
    assert supervised(example) == [[*words(answer), EOS] for answer in ANSWERS[:turns]]
    # The same from the tokens alone: from behind each <answer> to the next eos.
    tokens = example["tokens"].tolist()
    want = np.zeros(len(tokens), bool)
    for start in np.flatnonzero(example["tokens"] == BOA):
        want[start + 1 : tokens.index(EOS, start) + 1] = True
    np.testing.assert_array_equal(example["loss_mask"], want)
    assert tokens.count(BOA) == turns
    assert not example["loss_mask"][example["visual_index"] >= 0].any()
    assert (example["visual_index"] >= 0).sum() == (6 if turns == 1 else 6 + 8)


def test_the_legacy_labels_differ_on_the_same_sample():
    """Otter's get_labels takes what lies between the first <answer> and the second."""
    record = talk(3, (12, 8))
    right, legacy = encode("fuyu_chat", record), encode("fuyu_legacy_otter", record)
    assert supervised(right) == [[*words(answer), EOS] for answer in ANSWERS]
    between = [*words("a circleUser:and that one? Assistant:"), BOA]
    assert supervised(legacy) == [between, [EOS]]
    places = np.flatnonzero(legacy["tokens"] == BOA)
    inside = legacy["loss_mask"][places[0] + 1 : places[1] + 1]
    assert inside.all() and inside.sum() + 1 == legacy["loss_mask"].sum()


@functools.cache
def compiled_loss():
    decoder = dataclasses.replace(tiny.CONFIG.decoder, vocab_size=len(TOKENIZER))
    ids = dict(image_token_id=PROCESSOR.image_token_id, eos_token_id=EOS)
    model = tiny.model(dataclasses.replace(tiny.CONFIG, decoder=decoder, **ids))
    return jax.jit(lambda batch: loss_sum(model, batch))


@pytest.fixture
def loss():
    """The loss of a batch under one tiny model, compiled once for all tests of this file."""
    return compiled_loss()


def mixed(template):
    """Samples of one template: one to three turns, text alone and pictures at drawn sizes."""
    sides = list_resolutions({"min": 8, "max": 24, "multiple": 4})
    records = [talk(1, (40, 24)), talk(2, (24, 24), (9, 30)), talk(3), talk(3, (60, 12))]
    resized = [at_resolution(r, sides[i]) for i, r in enumerate(records)]
    return [encode(template, record) for record in resized]


@pytest.mark.heavy
@pytest.mark.parametrize("template", CHATS[:4])
def test_a_packed_batch_has_the_loss_of_its_samples_alone(loss, template):
    samples = mixed(template)
    packed, count = loss(pack(samples, SHAPE))
    assert len({len(s["patches"]) for s in samples}) == 4  # four resolutions, none among them
    alone = [loss(pack([sample], SHAPE)) for sample in samples]
    assert int(count) == sum(int(n) for _, n in alone) == sum(s["loss_mask"].sum() for s in samples)
    np.testing.assert_allclose(packed, sum(total for total, _ in alone), rtol=1e-5)
    assert min(float(total) for total, _ in alone) > 1


def test_a_packed_legacy_batch_has_the_loss_of_its_samples_alone(loss):
    records = [squash_first(talk(n, (30, 12)), side) for n, side in ((1, 8), (2, 12), (3, 20))]
    samples = [encode("fuyu_legacy_otter", record) for record in records]
    packed, _ = loss(pack(samples, SHAPE))
    alone = sum(loss(pack([sample], SHAPE))[0] for sample in samples)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)
