"""ArrayRecord: every record comes back as it was, images included."""

import io
import json
import pickle
import resource
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mmjax.data.array_record import (
    ArrayRecordSource,
    pack_record,
    unpack_record,
    write_array_records,
)
from mmjax.data.catalog import make_source
from mmjax.data.images import load_rgb
from mmjax.data.to_array_record import main, parse_source
from mmjax.types import BadSample, Message, MMJaxError, Record

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_flamingo_document_goldens import document


def record(i=0, images=(), **meta):
    turns = (Message("system", "s"), Message("user", f"q{i} 五"), Message("assistant", "a"))
    return Record(turns, tuple(images), {"id": f"r{i}", "answers": ["a"]} | meta)


def laid_anew(raw, **fields):
    """Write other fields into the header of a record, as another writer might."""
    (length,) = struct.unpack_from("<I", raw, 4)
    header = json.dumps(json.loads(raw[8 : 8 + length]) | fields).encode()
    return raw[:4] + struct.pack("<I", len(header)) + header + raw[8 + length :]


def test_a_record_comes_back_as_it_was(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    images = (tmp_path / "x.png", b"encoded", pixels, Image.fromarray(pixels))
    meta = dict(line=np.int64(3), source=tmp_path, raw=b"x", box=np.array([1, 2]), none=None)
    back = unpack_record(pack_record(record(1, images, **meta)), "x")
    assert back.messages == record(1).messages
    assert back.meta == {"id": "r1", "answers": ["a"], "line": 3, "source": str(tmp_path)} | dict(
        raw="x", box=[1, 2], none=None
    )
    assert back.images[:2] == ((tmp_path / "x.png").read_bytes(), b"encoded")
    for image in (back.images[0], *back.images[2:]):
        np.testing.assert_array_equal(load_rgb(image), pixels)


def test_the_layout_is_the_documented_one():
    raw = pack_record(Record((Message("user", "q"),), (b"abc", b"de"), {"id": 5}))
    assert raw[:4] == b"MMR1"
    (length,) = struct.unpack("<I", raw[4:8])
    assert json.loads(raw[8 : 8 + length]) == {
        "messages": [["user", "q"]],
        "images": [3, 2],
        "meta": {"id": 5},
    }
    assert raw[8 + length :] == b"abcde"
    for other in (raw[:-1], raw + b"f"):
        with pytest.raises(BadSample, match=f"holds {len(other)} bytes, and its header says"):
            unpack_record(other, "x")


def test_turns_with_several_images_and_videos_come_back_in_order(tmp_path):
    text = "Aa. <image>Bb. <image><image>Cc."
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    media = (b"one", (b"frame", pixels, b"x"), b"last", [b"alone"])
    packed = pack_record(Record((Message("user", text),), media, {"id": 1}))
    (length,) = struct.unpack("<I", packed[4:8])
    sizes = json.loads(packed[8 : 8 + length])["images"]
    assert sizes == [3, [5, sizes[1][1], 1], 4, [5]]
    write_array_records([packed], tmp_path / "out")
    back = ArrayRecordSource(tmp_path / "out")[0]
    assert back.messages == (Message("user", text),)
    assert (back.images[0], *back.images[2:]) == (b"one", b"last", (b"alone",))
    assert back.images[1][::2] == (b"frame", b"x")
    np.testing.assert_array_equal(load_rgb(back.images[1][1]), pixels)
    assert pack_record(back) == packed


def test_documents_of_webdataset_shards_are_copied_whole(tmp_path):
    info = document(["Aa.", "Bb.", "Cc."], [[0.1, 0.9, 0.2], [0.7, 0.2, 0.1], [0.1, 0.2, 0.5]])
    few = document(["Aa."], [[0.9]])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, one in (("1.json", info), ("2.json", info), ("3.txt", info), ("4.json", few)):
            member = tarfile.TarInfo(name)
            data = json.dumps(one).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    arguments = ["kind=mmc4", f"path={tmp_path}/a.tar", "min_images=2"]
    # What the source's own settings leave out is no sign of damage: one of four is broken here.
    assert main([str(tmp_path / "out"), *arguments, "--max_bad_share=0.24"]) == 1
    assert main([str(tmp_path / "again"), *arguments, "--max_bad_share=0.25"]) == 0
    given = make_source(dict(kind="mmc4", path=str(tmp_path / "a.tar")))
    source = ArrayRecordSource(tmp_path / "out")
    assert len(source) == 2 and [source[i] for i in (0, 1)] == [given[i] for i in (0, 1)]
    assert source[1].messages[0].text == "<image>Aa. <image>Bb. <image>Cc."
    assert [load_rgb(image)[0, 0, 0] for image in source[1].images] == [1, 0, 2]


def test_shards_give_random_access(tmp_path):
    packed = [pack_record(record(i, [bytes([i + 1]) * i])) for i in range(7)]
    assert write_array_records(packed, tmp_path / "out", shard_records=3) == 7
    names = [f"records-0000{i}.array_record" for i in range(3)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    opened = make_source({"kind": "array_record", "path": str(tmp_path / "out")})
    for source in (opened, pickle.loads(pickle.dumps(opened))):
        assert len(source) == 7
        for i in (6, 0, 3, 2, 5):
            assert source[i].meta["id"] == f"r{i}" and source[i].images == (bytes([i + 1]) * i,)
    assert len(ArrayRecordSource(tmp_path / "out" / names[2])) == 1
    with pytest.raises(IndexError):
        source[7]
    with pytest.raises(MMJaxError, match="exists already"):
        write_array_records(packed, tmp_path / "out")


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    """It is as large as the result, and nobody looks."""
    (left := tmp_path / "out.partial-7").mkdir()
    for name in ("INCOMPLETE", "records-00000.array_record"):
        (left / name).touch()
    assert write_array_records([pack_record(record())], tmp_path / "out") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["records-00000.array_record"]


def test_nothing_is_left_behind_by_a_write_that_fails(tmp_path):
    def broken():
        yield pack_record(record())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_array_records(broken(), tmp_path / "out")
    with pytest.raises(MMJaxError, match="no record to write"):
        write_array_records([], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_hold_the_records_is_told(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(MMJaxError, match="x cannot be written: .*File too large.*make room"):
            write_array_records([bytes(100_000)], tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "file").touch()
    with pytest.raises(MMJaxError, match="x cannot be written: .*Not a directory.*make room"):
        write_array_records([b""], tmp_path / "file" / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(MMJaxError, match="no such file.*to_array_record"):
        ArrayRecordSource(tmp_path)
    (tmp_path / "a.array_record").write_bytes(b"nothing")
    with pytest.raises(MMJaxError, match="cannot be read as ArrayRecord"):
        ArrayRecordSource(tmp_path)
    writer = ArrayRecordWriter(str(tmp_path / "b.array_record"), "group_size:1")
    writer.write(b"tfds")
    writer.close()
    with pytest.raises(MMJaxError, match="do not begin with MMR1"):
        ArrayRecordSource(tmp_path / "b.array_record")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda raw: raw[:-1], "its header says"),
        (lambda raw: b"MMR2" + raw[4:], "begins with b'MMR2'"),
        (lambda raw: raw[:9], "here: "),
        (lambda raw: raw.replace(b"user", b"usar"), "unknown role 'usar'"),
        (lambda raw: laid_anew(raw, messages=[["user", None]]), "a message is no text"),
        (lambda raw: laid_anew(raw, meta=None), "or meta is no object"),
    ],
)
def test_a_broken_record_is_a_bad_sample(spoil, says):
    with pytest.raises(BadSample, match=says):
        unpack_record(spoil(pack_record(record(0, [b"xyz"]))), "here")


def test_meta_that_is_not_json_is_named():
    with pytest.raises(MMJaxError, match="record r0: its meta is not JSON: object"):
        pack_record(record(thing=object()))


def test_the_command_copies_a_source_and_counts_what_it_leaves_out(tmp_path, capsys):
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "x.png")
    rows = [{"id": i, "image": "x.png", "question": "q", "answer": f"a{i}"} for i in range(9)]
    rows[4]["image"] = "gone.png"
    (tmp_path / "a.json").write_text(json.dumps(rows))
    arguments = [str(tmp_path / "out"), "kind=json", f"path={tmp_path}/a.json"]
    assert main([*arguments, "--shard_records=4"]) == 1
    printed = capsys.readouterr().out
    assert "out: 8 of 9 records" in printed and "left out 1 missing_image:" in printed
    assert "record 4: " in printed and "gone.png" in printed
    source = ArrayRecordSource(tmp_path / "out")
    assert [source[i].meta["id"] for i in range(8)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert load_rgb(source[3].images[0])[0, 0].tolist() == [9, 8, 7]
    arguments[0] += "2"
    assert main([*arguments, "--max_bad_share=0.2"]) == 0


def test_the_command_says_why_nothing_can_be_copied(tmp_path):
    rows = [{"image": f"{i}.png", "question": "q", "answer": "a"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(
        MMJaxError, match="none of 3 records can be copied; 3 missing_image: .*0.png"
    ):
        main([str(tmp_path / "out"), "kind=json", f"path={tmp_path}/a.json"])
    assert not (tmp_path / "out").exists()


def test_arguments_of_a_source_are_literals_or_text():
    assert parse_source(["kind=json", "n=3", "lines=['a']", "path=a=b"]) == dict(
        kind="json", n=3, lines=["a"], path="a=b"
    )
    for items, says in ((["json"], "'json': write key=value"), (["a=1", "a=2"], "given twice")):
        with pytest.raises(MMJaxError, match=says):
            parse_source(items)
