"""WebDataset shards, written by tarfile: every format, random access, and damage that is named."""

import gzip
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmjax.data import webdataset
from mmjax.data.catalog import make_source
from mmjax.data.images import load_rgb
from mmjax.data.templates import TEMPLATES
from mmjax.data.webdataset import LaionSource, Shards, expand_shards
from mmjax.types import BadSample, Message, MMJaxError

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from make_flamingo_document_goldens import MEMBERS  # noqa: E402


def picture(value, form="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT, **headers):
    """Write members (name, bytes); None for a folder."""
    with tarfile.open(path, "w", format=format, **headers) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first, count, suffix="jpg"):
    form = "PNG" if suffix == "png" else "JPEG"
    for i in range(first, first + count):
        yield f"{i:05}.{suffix}", picture(i, form)
        yield f"{i:05}.txt", f" Captiön {i}.\n".encode()


@pytest.fixture
def shards(tmp_path):
    """Three shards of 4, 1 and 3 samples."""
    for number, (first, count) in enumerate([(0, 4), (4, 1), (5, 3)]):
        write_tar(tmp_path / f"{number:03}.tar", pairs(first, count))
    return tmp_path


def test_samples_are_read_at_random_across_shards(shards):
    opened = LaionSource(f"{shards}/{{000..002}}.tar")
    for source in (opened, pickle.loads(pickle.dumps(opened))):
        assert len(source) == 8
        for i in (7, 0, 4, 3, 5):
            record = source[i]
            assert record.messages == (
                Message("user", "<image>"), Message("assistant", f"Captiön {i}."),
            )  # fmt: skip
            assert record.images == (picture(i),)
            shard = f"{0 if i < 4 else 1 if i < 5 else 2:03}.tar"
            assert record.meta["id"] == f"{shard}/{i:05}"
            assert record.meta["source"] == str(shards / shard)
            assert record.meta["answers"] == [f"Captiön {i}."]
        for i in (8, -1):
            with pytest.raises(IndexError):
                source[i]
    caption = TEMPLATES["laion_caption"](opened[2])
    assert [s.value for s in caption] == ["bos", 0, "Captiön 2.", "eoc", "eos"]


def test_an_offset_is_where_tar_has_the_sample(shards):
    with tarfile.open(shards / "000.tar") as tar:
        wanted = [m.offset for m in tar if m.name.endswith("jpg")]
    source = LaionSource(shards / "000.tar")
    assert [source[i].meta["line"] for i in range(4)] == wanted


@pytest.mark.parametrize("suffix", ["jpg", "png", "jpeg"])
def test_pictures_of_each_suffix_with_json_beside_them(tmp_path, suffix):
    members = [*pairs(3, 1, suffix), ("00003.json", json.dumps({"url": "x"}).encode())]
    write_tar(tmp_path / "a.tar", members)
    (record,) = list(make_source(dict(kind="laion", path=str(tmp_path))))
    assert abs(int(load_rgb(record.images[0])[0, 0, 0]) - 3) <= 1


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_with_long_names(tmp_path, format):
    # 140 characters: a prefix for ustar, a long name for GNU and a header of its own for PAX.
    long = "/".join(["f" * 60, "g" * 60, "00001"])
    names = ["00000.jpg", f"{long}.jpg", f"{long}.txt", "ünï.jpg"]
    members = [(name, picture(i)) for i, name in enumerate(names)]
    headers = {"pax_headers": {"comment": "all"}} if format == tarfile.PAX_FORMAT else {}
    write_tar(tmp_path / "a.tar", [("f/", None), *members], format, **headers)
    found = list(Shards(tmp_path / "a.tar"))
    assert [sample.id for sample in found] == ["a.tar/00000", f"a.tar/{long}", "a.tar/ünï"]
    assert [list(sample.files) for sample in found] == [["jpg"], ["jpg", "txt"], ["jpg"]]
    assert [b for sample in found for b in sample.files.values()] == [b for _, b in members]


def test_members_are_grouped_as_the_peer_groups_them(tmp_path):
    write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in MEMBERS])
    found = list(Shards(tmp_path / "a.tar"))
    wanted = json.loads((GOLDEN / "flamingo_documents.json").read_text())["samples"]
    assert [[s.id.removeprefix("a.tar/"), list(s.files)] for s in found] == wanted
    assert [n for s in found for n in s.files.values()] == [
        n.encode() for n in MEMBERS if n != "README"
    ]


def test_what_belongs_to_no_sample_is_left_out(tmp_path):
    names = ["__meta__/x.json", "._0.jpg", "0.jpg", "d/.hidden.txt", "readme", "0.txt", "1.jpg"]
    write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    found = [(s.id, list(s.files)) for s in Shards(tmp_path / "a.tar")]
    assert found == [("a.tar/0", ["jpg", "txt"]), ("a.tar/1", ["jpg"])]


def test_the_index_is_built_once_and_again_for_a_changed_shard(shards, monkeypatch):
    Shards(shards)
    built = []
    index = webdataset.index_shard
    monkeypatch.setattr(webdataset, "index_shard", lambda p: built.append(p.name) or index(p))
    assert len(Shards(shards)) == 8 and not built
    write_tar(shards / "001.tar", pairs(40, 3))
    assert len(Shards(shards)) == 10 and built == ["001.tar"]
    built.clear()
    assert len(Shards(shards, index_dir=shards / "index")) == 10 and len(built) == 3
    assert len(list((shards / "index").iterdir())) == 3


def test_paths_are_expanded_in_order(shards):
    names = ["000.tar", "001.tar", "002.tar"]
    for path in (
        *(shards, str(shards), f"{shards}/{{000..002}}.tar", f"{shards}/{{000,001,002}}.tar"),
        *(f"{shards}/*.tar", [shards / "000.tar", f"{shards}/00{{1..2}}.tar"]),
    ):
        assert [p.name for p in expand_shards(path)] == names
    backwards = expand_shards(f"{shards}/{{002..000}}.tar")
    assert [p.name for p in backwards] == names[::-1]
    (shards / "b{x}1.tar").write_bytes((shards / "001.tar").read_bytes())
    assert [p.name for p in expand_shards(f"{shards}/b{{x}}{{1..1}}.tar")] == ["b{x}1.tar"]
    (shards / "b[1].tar").write_bytes((shards / "001.tar").read_bytes())
    assert [p.name for p in expand_shards(f"{shards}/b[1].tar")] == ["b[1].tar"]


@pytest.mark.parametrize(
    "path, says",
    [
        ("{000..004}.tar", r"003.tar: no such file \(2 of 5 shards are missing\)"),
        ("gone/*.tar", "no file matches this pattern"),
        ("", "holds no file"),
        ("pipe:aws s3 cp s3://x/{0..9}.tar -", "copy them to a disk"),
        ("s3://bucket/{0..9}.tar", "copy them to a disk"),
        ([], "no such file"),
    ],
)
def test_shards_that_are_not_there(shards, path, says):
    (shards / "empty").mkdir()
    full = path if not isinstance(path, str) or ":" in path else f"{shards}/{path or 'empty'}"
    with pytest.raises(MMJaxError, match=says):
        Shards(full)


@pytest.mark.parametrize("name", ["000.tar.gz", "000.tar"])
def test_compressed_shards_are_refused_with_the_fix(shards, name):
    raw = (shards / "000.tar").read_bytes()
    (shards / name).write_bytes(gzip.compress(raw))
    with pytest.raises(MMJaxError, match=f"{name}: is compressed with gzip.*gunzip"):
        Shards(shards / name, damaged="skip")


def cut(length):
    return lambda raw: raw[:length]


def flip(at):
    return lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "spoil, says, left",
    [
        (cut(5120 + 100), "ends at byte 5220 without the mark that ends an archive", 1),
        (
            cut(5120 + 600),
            "'2.jpg' at byte 5120 needs 700 bytes from 5632 on.* ends at byte 5720",
            1,
        ),
        (cut(7680), "ends at byte 7680 without the mark", 2),
        (flip(5120 + 1), "no tar header at byte 5120", 1),
        (flip(2560 + 130), "no tar header at byte 2560", 0),
        (
            lambda raw: raw[:5120] + bytes(512) + raw[5632:],
            "zeros at byte 5120 mark its end, and there is data behind them",
            1,
        ),
        (lambda raw: raw + raw, "zeros at byte 7680 mark its end, and there is data behind", 2),
        (lambda raw: raw + bytes(2**20), "its last 1051136 bytes, from 7680 on, begin with", 2),
        (lambda raw: b"<!DOCTYPE html>" + bytes(800), r"byte 0 \(it begins b'<!DOCTYPE html>", 0),
        (lambda raw: b"", "ends at byte 0 without", 0),
    ],
)
def test_damage_names_shard_and_byte(shards, spoil, says, left):
    """Three samples of 2,560 bytes: two headers, 700 bytes in two blocks and 5 in one."""
    members = [(f"{i}.{s}", bytes(n)) for i in range(3) for s, n in (("jpg", 700), ("txt", 5))]
    path = write_tar(shards / "bad.tar", members)
    path.write_bytes(spoil(path.read_bytes()))
    for _ in range(2):  # the second time from the index
        with pytest.raises(MMJaxError, match=rf"bad.tar: .*{says}.*\(1 of 4 shards"):
            Shards(shards)
    taken = Shards(shards, damaged="skip")
    assert len(taken) == 8 + left
    assert [s.id for s in taken][8:] == [f"bad.tar/{i}" for i in range(left)]


def test_a_file_that_changed_behind_the_index_is_a_bad_sample(shards):
    source = LaionSource(shards)
    raw = (shards / "000.tar").read_bytes()
    (shards / "000.tar").write_bytes(flip(2)(raw))
    with pytest.raises(BadSample, match=r"000.tar: sample at byte 0: there is no tar header"):
        source[0]
    (shards / "000.tar").write_bytes(raw[:5000])
    with pytest.raises(
        BadSample, match=r"000.tar: sample at byte 7680: 0 of its \d+ bytes are there"
    ):
        source[3]
    (shards / "000.tar").unlink()
    with pytest.raises(BadSample, match="No such file"):
        source[1]
    assert source[7].images == (picture(7),)


def test_a_sample_without_its_parts_is_a_bad_sample(tmp_path):
    members = [
        ("0.txt", b"x"),
        ("1.jpg", b"x"),
        ("2.jpg", b"x"),
        ("2.txt", b"\xff"),
        ("3.webp", b""),
    ]
    members += [("4.png", b"x"), ("4.txt", b" ")]
    write_tar(tmp_path / "a.tar", members)
    source = LaionSource(tmp_path)
    for i, (reason, says) in enumerate(
        [
            ("missing_image", r"a.tar: byte 0 \(id a.tar/0\): there is no jpg.*found txt"),
            ("empty_answer", "there is no txt.*found jpg"),
            ("bad_record", "txt is not UTF-8"),
            ("missing_image", "found webp"),
        ]
    ):
        with pytest.raises(BadSample, match=says) as error:
            source[i]
        assert error.value.reason == reason
        assert error.value.meta["id"] == f"a.tar/{i}" and error.value.meta["line"] % 512 == 0
    with pytest.raises(BadSample, match="an assistant turn is empty"):
        TEMPLATES["laion_caption"](source[4])


def test_a_huge_size_in_base_256_is_read(tmp_path):
    info = tarfile.TarInfo("0.jpg")
    info.size = 9 * 2**30
    head = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(head)
    with pytest.raises(MMJaxError, match=f"needs {9 * 2**30} bytes from 512 on"):
        Shards(tmp_path / "a.tar")


def test_a_size_in_a_pax_header_counts_before_the_members_own(tmp_path):
    info = tarfile.TarInfo("0.jpg")
    info.size, info.pax_headers = 3, {"size": "700"}
    body = bytes(range(100)) * 7
    end = tarfile.TarInfo("1.jpg").tobuf() + bytes(1024)
    whole = info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512) + end
    (tmp_path / "a.tar").write_bytes(whole)
    assert [sample.files for sample in Shards(tmp_path / "a.tar")] == [{"jpg": body}, {"jpg": b""}]


def test_times_in_gnus_own_header_are_no_front_of_a_name(tmp_path):
    head = bytearray(tarfile.TarInfo("0.jpg").tobuf(tarfile.GNU_FORMAT))
    head[345:357] = head[357:369] = b"14000000000\0"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "a.tar").write_bytes(head + bytes(1024))
    assert [sample.id for sample in Shards(tmp_path / "a.tar")] == ["a.tar/0"]


def test_arguments_are_checked(shards):
    with pytest.raises(MMJaxError, match="damaged 'keep'"):
        Shards(shards, damaged="keep")
    write_tar(shards / "none.tar", [("readme", b"x")])
    with pytest.raises(MMJaxError, match="none.tar .*there is no sample"):
        Shards(shards / "none.tar")
    assert np.array_equal(Shards([shards / "none.tar", shards / "001.tar"])[0].offset, 0)
