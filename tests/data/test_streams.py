"""Streams: the same rows in every step, however many processes share them out."""

import asyncio

import numpy as np
import pytest

from mmjax.data.pipeline import make_train_iterator
from mmjax.data.streams import Streams, share_streams
from mmjax.types import Message, MMJaxError, Record
from tests.data.stub_processor import StubProcessor


class Numbers:
    """Records of uneven length whose text is their number."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        messages = (Message("user", "?" * (i % 5)), Message("assistant", str(i)))
        return Record(messages, (), {"id": str(i)})


def streams(mine, count=4, rows=8):
    def one(number):
        return make_train_iterator(
            Numbers(), "plain", StubProcessor(), seq_len=24, max_patches=1, max_targets=12,
            batch_size=rows // count, process_index=number, process_count=count,
        )  # fmt: skip

    return Streams({number: one(number) for number in mine}, count)


class Directory:
    """A folder as Orbax hands it to what it saves."""

    def __init__(self, path):
        self.path = path

    async def await_creation(self):
        return self.path


def save(it, path):
    async def both():
        await (await it.save(Directory(path)))

    asyncio.run(both())


def load(it, path):
    async def both():
        await (await it.load(path))

    asyncio.run(both())


def test_rows_and_records_do_not_depend_on_who_makes_them():
    whole, first, second = streams(range(4)), streams([0, 1]), streams([2, 3])
    for _ in range(6):
        want, one, two = next(whole), next(first), next(second)
        for name, value in want.items():
            np.testing.assert_array_equal(np.concatenate([one[name], two[name]]), value)
        assert whole.records == first.records + second.records
        assert len(whole.records) == 8 and all(whole.records)


def test_a_position_goes_on_with_any_number_of_processes(tmp_path):
    parts = [streams([0, 1]), streams([2, 3])]
    for _ in range(3):
        [next(part) for part in parts]
    [save(part, tmp_path) for part in parts]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"stream_{i}-of-4.json" for i in range(4)]
    one = streams(range(4))
    load(one, tmp_path)
    wanted = np.concatenate([next(part)["tokens"] for part in parts])
    np.testing.assert_array_equal(next(one)["tokens"], wanted)


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    async def in_turn(function, *arguments):
        function(*arguments)
        await asyncio.sleep(0)  # the other writer does the same thing next

    async def both():  # as processes of two hosts, with the same id
        writes = [await it.save(Directory(tmp_path)) for it in (streams([0]), streams([0]))]
        await asyncio.gather(*writes)

    monkeypatch.setattr(asyncio, "to_thread", in_turn)
    asyncio.run(both())
    assert [p.name for p in tmp_path.iterdir()] == ["stream_0-of-4.json"]


def test_another_number_of_streams_is_refused(tmp_path):
    save(streams(range(4)), tmp_path)
    with pytest.raises(MMJaxError, match=r"of 4 stream\(s\) and this run has 2.*data.streams"):
        load(streams(range(2), count=2), tmp_path)
    with pytest.raises(MMJaxError, match="of no stream"):
        streams([0]).set_state({})


def test_streams_are_shared_by_rows():
    assert share_streams(range(8), 8) == ([0], 1)
    assert share_streams(range(4, 8), 8) == ([1], 2)
    assert share_streams(range(4, 8), 8, 4) == ([2, 3], 4)
    assert share_streams(range(8), 8, 4) == ([0, 1, 2, 3], 4)
    with pytest.raises(MMJaxError, match="batch_size 8 does not divide into data.streams 3"):
        share_streams(range(8), 8, 3)
    with pytest.raises(MMJaxError, match="holds 2 of 8.*a multiple of 4"):
        share_streams(range(2), 8, 2)
