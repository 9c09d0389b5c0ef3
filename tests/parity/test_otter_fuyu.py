"""OtterHD's training beside its own code: token ids, labels and pixels, its faults and ours."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mmjax.data.examples import legacy_loading
from mmjax.data.mimicit import MimicitSource
from mmjax.data.resizing import squash_first
from mmjax.data.templates import fuyu_chat
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.fuyu.processor import FuyuProcessor, ProcessorConfig

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import otter_data as files  # noqa: E402

STRIPPED = [case for case in files.FUYU_CASES if "stripped" in case]


@pytest.fixture(scope="module")
def golden():
    """The peer's rows, {case: {id: (tokens, labels, patches)}}."""
    rows = {}
    with np.load(Path(os.environ.get("OTTER_GOLDENS", GOLDEN)) / "otter_fuyu.npz") as file:
        for case, name, _ in (key.split("/") for key in file.files):
            found = tuple(file[f"{case}/{name}/{what}"] for what in ("tokens", "labels", "patches"))
            rows.setdefault(case, {})[name] = found
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("mimicit")
    files.write_files(made)
    return made


@pytest.fixture(scope="module")
def processor():
    height, width = files.FUYU_BOX
    config = ProcessorConfig(patch_size=files.FUYU_PATCH, max_height=height, max_width=width)
    return FuyuProcessor(config, build_word_tokenizer(files.FUYU_WORDS))


def records(folder, case):
    """Open a case as a recipe for OtterHD does."""
    group, _, _, related, symbols, _ = files.CASES[case]
    options = dict(group=group, populate_rel_ins=related, keep_symbols=symbols)
    source = MimicitSource(**files.paths(folder, case), **options)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("case", STRIPPED)
def test_legacy_otter_is_its_own_code(golden, folder, processor, case):
    template, resize = legacy_loading(fuyu_chat, (files.FUYU_SIDE,))
    made = records(folder, case)
    assert [one.meta["id"] for one in made] == list(golden[case])
    for record in made:
        tokens, labels, patches = golden[case][record.meta["id"]]
        squashed = resize(record, files.FUYU_SIDE)
        ours = processor.encode(template(squashed), squashed.images)
        assert ours["tokens"].tolist() == tokens.tolist()
        np.testing.assert_array_equal(ours["loss_mask"], labels != -100)
        grey = (patches.astype(np.float64) * 0.5 + 0.5) * 255
        np.testing.assert_allclose(ours["patches"], grey, atol=1e-3)


def test_a_single_turn_is_the_same_our_way(golden, folder, processor):
    """With its symbols, and a picture that is squashed alike."""
    for record in records(folder, "image"):
        tokens, labels, _ = golden["image"][record.meta["id"]]
        squashed = squash_first(record, files.FUYU_SIDE)
        ours = processor.encode(fuyu_chat(squashed), squashed.images)
        assert ours["tokens"].tolist() == tokens.tolist()
        np.testing.assert_array_equal(ours["loss_mask"], labels != -100)


def test_of_several_turns_every_answer_is_learnt_and_no_question(golden, folder, processor):
    """The peer learns the first answer, the second question, and the end of the last answer."""
    record = records(folder, "image_turns")[2]
    tokens, labels, _ = golden["image_turns"]["A2"]
    squashed = squash_first(record, files.FUYU_SIDE)
    ours = processor.encode(fuyu_chat(squashed), squashed.images)
    words = processor.tokenizer
    learnt = words.decode(ours["tokens"][ours["loss_mask"]]).split("|ENDOFTEXT|")
    answers = [message.text for message in record.messages if message.role == "assistant"]
    assert [text.strip() for text in learnt] == [*answers, ""]
    theirs = words.decode(labels[labels != -100])
    assert theirs.startswith("A cat.User:Look") and "Ann" not in theirs
    assert (tokens == words.eos_token_id).sum() == 1 and len(answers) == 3
