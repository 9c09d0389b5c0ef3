"""Text that is no Unicode: half a surrogate pair, as JSON holds it where an emoji was cut."""

import json

import numpy as np
import pytest

from mmjax.data.array_record import pack_record, unpack_record
from mmjax.data.examples import make_loader
from mmjax.data.mimicit import MimicitSource
from mmjax.data.mixture import Mixture
from mmjax.data.packing import BatchShape
from mmjax.data.skips import Skip, SkipLog
from mmjax.data.sources import JsonSource
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.fuyu.processor import FuyuProcessor

HALF = "\ud83d"


def rows(path):
    path.write_text(json.dumps([{"id": HALF, "question": f"q{HALF}", "answer": "a"}]))
    assert "\\ud83d" in path.read_text()
    return JsonSource(path)


def test_a_record_with_half_a_character_is_skipped_and_listed(tmp_path):
    processor = FuyuProcessor(tokenizer=build_word_tokenizer(["a"]))
    mixture = Mixture.of(rows(tmp_path / "a.json"))
    load = make_loader(mixture, "fuyu_chat", processor, BatchShape(1, 64, 1, 8))
    skip = load((0, 0, 0))
    assert isinstance(skip, Skip) and (skip.reason, skip.id) == ("bad_text", HALF)
    assert "half a character, '\\ud83d', in 'User:q\\ud83d Assistant:'" in skip.message
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_share=1.0)
    log.add(2, (skip,))
    (listed,) = map(json.loads, (tmp_path / "skipped.jsonl").read_bytes().splitlines())
    assert listed["id"] == HALF and listed["message"] == skip.message


def test_ids_may_hold_half_a_character(tmp_path):
    entry = {"instruction": "q", "answer": "a", "image_ids": [HALF], "rel_ins_ids": []}
    (tmp_path / "ins.json").write_text(json.dumps({"data": {"é" + HALF: entry}}))
    (tmp_path / "images.json").write_text(json.dumps({HALF: "QUJD"}))
    (record,) = MimicitSource(tmp_path / "ins.json", tmp_path / "images.json")
    assert record.meta["id"] == "é" + HALF and record.images == (b"ABC",)


def test_a_record_with_half_a_character_is_copied_as_it_is(tmp_path):
    record = rows(tmp_path / "a.json")[0]
    assert unpack_record(pack_record(record), "here") == record


@pytest.mark.parametrize("message", ["a\u2028b", HALF, "plain"])
def test_what_is_listed_is_known_after_a_restart(tmp_path, message):
    path = tmp_path / "skipped.jsonl"
    skip = Skip("ä", "s", 0, "corrupt_image", message)
    SkipLog(path).add(1, (skip,))
    with open(path, "ab") as file:
        file.write('{"id": "ä'.encode()[:-1] + b"\n")  # cut off within a character
    log = SkipLog(path)
    log.restore({"seen": np.int64(1), "counts": {}})
    log.add(1, (skip,))
    assert path.read_bytes().count(b"\n") == 2
