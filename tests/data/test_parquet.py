"""Parquet as the Hugging Face hub has it: rows as records, read by row group."""

import io
import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmjax.data import parquet_files
from mmjax.data.catalog import make_source
from mmjax.data.images import load_rgb
from mmjax.data.parquet import ParquetImages, ParquetSource, decode_base64
from mmjax.data.parquet_files import ParquetFiles
from mmjax.data.regroup_parquet import main as regroup_command
from mmjax.data.regroup_parquet import regroup
from mmjax.types import BadSample, MMJaxError


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def vqa(count=7):
    return {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)],
        "question": [f"q{i}?" for i in range(count)],
        "answers": [[f"a{i}", "b"] for i in range(count)],
    }


def write(path, columns, group=3):
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_rows_of_one_file_or_a_folder(tmp_path):
    whole = ParquetSource(write(tmp_path / "a.parquet", vqa()))
    assert len(whole) == 7
    for i in (6, 0, 3, 2):
        record = whole[i]
        assert [m.text for m in record.messages] == [f"q{i}?", f"a{i}"]
        assert load_rgb(record.images[0])[0, 0, 0] == i
        assert record.meta["answers"] == [f"a{i}", "b"] and record.meta["id"] == str(i)
        assert (record.meta["source"], record.meta["line"]) == (str(tmp_path / "a.parquet"), i)
    folder = tmp_path / "many"
    folder.mkdir()
    for k in range(3):
        write(folder / f"train-{k}.parquet", {n: v[k * 2 : k * 2 + 2] for n, v in vqa().items()})
    many = pickle.loads(pickle.dumps(make_source({"kind": "parquet", "path": str(folder)})))
    assert [many[i].messages[0].text for i in range(6)] == [f"q{i}?" for i in range(6)]
    with pytest.raises(IndexError):
        many[6]
    write(folder / "more.parquet", vqa(2))
    for pattern, rows in (("train-*.parquet", 6), ("train-[12].parquet", 4), ("**/m*.parquet", 2)):
        assert len(ParquetSource(folder / pattern)) == rows
    assert len(ParquetSource(folder)) == 8


@pytest.mark.parametrize(
    "names, pattern",
    [
        (("data/test-0-of-1.parquet", "data/train-0-of-1.parquet"), "data/test*.parquet"),
        (("default/train/0000.parquet", "default/validation/0000.parquet"), "train/*.parquet"),
        (("Train.parquet", "val.parquet", "extra.parquet"), "Train*.parquet"),
    ],
)
def test_a_folder_of_several_splits_is_refused(tmp_path, names, pattern):
    """They were read together: a model was trained on what it is tested with."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, vqa(2))
    with pytest.raises(MMJaxError) as error:
        ParquetSource(tmp_path)
    assert f"holds several splits, {names[0]} and {names[1]}; name the files" in str(error.value)
    suggested = str(error.value).partition("such as ")[2].partition(", and let")[0]
    assert suggested.endswith(pattern) and len(ParquetSource(suggested)) == 2


def test_only_the_row_groups_that_are_asked_for_are_read(tmp_path, monkeypatch):
    source = ParquetSource(write(tmp_path / "a.parquet", vqa(), group=2))
    read = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns: read.append(group) or plain(self, group, columns=columns),
    )
    for i in (4, 5, 0, 1, 4, 6):
        source[i]
    assert read == [2, 0, 3]  # two groups are kept
    assert {len(t) for t in source._files._kept.values()} == {2, 1}


def scrub(path, column):
    """Destroy the bytes of a column in a file."""
    metadata, data = pq.ParquetFile(path).metadata, bytearray(path.read_bytes())
    for group in range(metadata.num_row_groups):
        parts = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        (part,) = (part for part in parts if part.path_in_schema == column)
        start, size = part.data_page_offset, part.total_compressed_size
        data[start : start + size] = bytes(size)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "pictures, scrubbed, counts",
    [
        ({"image": [{"bytes": b"x" * 99, "path": p} for p in ("a", None, "b")]}, True, [1, 1, 1]),
        ({"image": [{"bytes": b"x" * 99, "path": None}, None, None]}, True, [1, 0, 0]),
        (
            {"images": [[], [{"bytes": b"x" * 99, "path": "a"}] * 2, None]},
            *("images.list.element.bytes", [0, 2, 0]),
        ),
        ({"image": [b"x" * 99] * 3}, "image", [1, 1, 1]),
        ({"image": [b"x" * 99, None, b"y"]}, None, [1, 0, 1]),
    ],
)
def test_outlines_count_pictures_that_they_do_not_read(tmp_path, pictures, scrubbed, counts):
    path, texts = tmp_path / "a.parquet", {n: v[:3] for n, v in vqa(3).items() if n != "image"}
    table = pa.table({**texts, **pictures})
    pq.write_table(table, path, compression="NONE", use_dictionary=False)
    if scrubbed:
        scrub(path, "image.bytes" if scrubbed is True else scrubbed)
    source = ParquetSource(path)
    if scrubbed:
        with pytest.raises(BadSample):
            source[0]
    first, found = source.outlines(2)
    assert first == 0 and [len(record.images) for record in found] == counts
    assert [record.messages[0].text for record in found] == ["q0?", "q1?", "q2?"]


def test_outlines_are_of_a_records_own_row_group(tmp_path):
    write(tmp_path / "a.parquet", vqa(3))
    turns = [{"role": "user", "content": "<image>" * (i > 3)} for i in range(7)]
    chat = {"image": vqa()["image"], "messages": [[t] for t in turns], "id": list("abcdefg")}
    source = ParquetSource(write(tmp_path / "b.parquet", chat, group=5))
    first, found = source.outlines(6)
    assert first == 5 and [record.meta["id"] for record in found] == ["f", "g"]
    chat["messages"][1] = [{"role": "user", "content": "<image><image>"}]
    first, (good, bad, *_) = ParquetSource(write(tmp_path / "c.parquet", chat, 5)).outlines(3)
    assert first == 0 and good.meta["id"] == "a"
    assert isinstance(bad, BadSample) and bad.reason == "image_mismatch" and bad.meta["id"] == "b"


def test_threads_read_what_they_ask_for(tmp_path):
    source = ParquetSource(write(tmp_path / "a.parquet", vqa(40), group=3))
    order = np.random.default_rng(0).integers(0, 40, 200).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: source[i].messages[0].text, order))
    assert found == [f"q{i}?" for i in order]


def test_other_forms_and_names_of_columns(tmp_path):
    turns = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "A"}]
    chat = {"images": [[png(1), png(2)]], "messages": [turns], "id": ["x1"]}
    record = ParquetSource(write(tmp_path / "chat.parquet", chat))[0]
    assert [m.role for m in record.messages] == ["user", "assistant"] and record.meta["id"] == "x1"
    assert [load_rgb(i)[0, 0, 0] for i in record.images] == [1, 2]
    llava = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    text = {"conversations": [json.dumps(llava), "["], "image": ["x.png", None]}
    source = ParquetSource(write(tmp_path / "text.parquet", text), image_root=tmp_path)
    assert source[0].images == (f"{tmp_path}/x.png",) and source[0].messages[1].text == "a"
    with pytest.raises(BadSample, match="'conversations' is not JSON"):
        source[1]
    said = [{"role": role, "content": role[0]} for role in ("user", "assistant")]
    both = {"id": [None, "x"], "question": ["q", None], "answer": ["a", None]}
    source = ParquetSource(write(tmp_path / "both.parquet", both | {"messages": [None, said]}))
    assert [(r.meta["id"], len(r.messages)) for r in source] == [("0", 2), ("x", 2)]
    named = {"img": [png(5)], "query": ["q"], "label": ["a"]}
    fields = {"image": "img", "question": "query", "answer": "label"}
    record = ParquetSource(write(tmp_path / "named.parquet", named), fields)[0]
    assert record.messages[1].text == "a" and load_rgb(record.images[0])[0, 0, 0] == 5


def test_bad_rows_are_bad_samples(tmp_path):
    rows = {"image": [{"bytes": b"", "path": None}], "question": ["q"], "answer": ["a"]}
    with pytest.raises(BadSample, match="an image is NoneType") as error:
        ParquetSource(write(tmp_path / "a.parquet", rows))[0]
    assert error.value.reason == "missing_image"
    # Listed by its own id: by its number it was taken for the first one, whose id that is.
    rows = {"id": ["1", "x"], "question": ["q", None], "answer": ["a", "b"]}
    source = ParquetSource(write(tmp_path / "a.parquet", rows))
    with pytest.raises(BadSample) as error:
        source[1]
    wanted = {"id": "x", "source": str(tmp_path / "a.parquet"), "line": 1}
    assert error.value.meta == wanted and source[0].meta["id"] == "1"


def test_large_row_groups_are_refused_and_written_anew(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "big.parquet", vqa(20), group=20)
    monkeypatch.setattr(parquet_files, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(MMJaxError, match=r"row group 0 holds .*regroup_parquet .*big\.parquet NEW"):
        ParquetSource(path)
    assert regroup_command([str(path), str(tmp_path / "small.parquet"), "--rows", "4"]) == 0
    assert "20 rows, 4 in each group" in capsys.readouterr().out
    source = ParquetSource(tmp_path / "small.parquet")
    assert source._files._groups[:, 2].tolist() == [4] * 5
    assert [source[i].messages[1].text for i in range(20)] == [f"a{i}" for i in range(20)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.parquet", "small.parquet"]
    with pytest.raises(MMJaxError, match="big.parquet: exists already"):  # arguments swapped
        regroup(tmp_path / "small.parquet", path)
    with pytest.raises(MMJaxError, match="--rows 0"):
        regroup(path, tmp_path / "x", 0)


def test_a_damaged_row_group_is_a_bad_sample_and_a_damaged_id_column_an_error(tmp_path):
    columns = {"id": ["a", "b"], "base64": ["QUJD"] * 2, "question": ["q"] * 2, "answer": ["a"] * 2}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + b"\xff" * 20 + raw[24:])  # the header of the first page
    with pytest.raises(BadSample, match=r"a.parquet: row group 0 cannot be read \("):
        ParquetSource(path)[0]
    with pytest.raises(MMJaxError, match="a.parquet: row group 0 .*fetch the file again"):
        ParquetImages(path)
    names = [m.start() for m in re.finditer(b"question", raw)]  # the schema's, the row group's
    for at, says in zip(names, ("cannot be read as parquet", "row group 0 has a col"), strict=True):
        (tmp_path / "c").write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
        with pytest.raises(MMJaxError, match=f"c: {says}.* 0xff"):
            ParquetSource(tmp_path / "c")
    pq.write_table(pa.table(columns).replace_schema_metadata({"pandas": "{"}), tmp_path / "c")
    with pytest.raises(MMJaxError, match="c: what pandas wrote of its index is no JSON object"):
        ParquetImages(tmp_path / "c")
    (tmp_path / "c").unlink()
    for source, target in ((path, "b"), (tmp_path / "no.parquet", "b"), (path, "no/b")):
        with pytest.raises(MMJaxError, match="cannot be written anew as"):
            regroup(source, tmp_path / target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_text_that_is_not_utf8_is_a_bad_sample_and_ids_an_error(tmp_path):
    latin = pa.array(["süß".encode("latin-1"), b"sweet"]).view(pa.string())
    path = write(tmp_path / "a.parquet", {"question": latin, "answer": ["a", "b"]})
    source = ParquetSource(path)
    with pytest.raises(BadSample, match="a.parquet:0: 'question' is not UTF-8") as error:
        source[0]
    assert error.value.reason == "bad_record" and source[1].messages[0].text == "sweet"
    with pytest.raises(MMJaxError, match="b.parquet: 'id' is not UTF-8 .*write the file anew"):
        ParquetImages(write(tmp_path / "b.parquet", {"id": latin, "base64": ["QUJD"] * 2}))


@pytest.mark.parametrize(
    "columns, options, says",
    [
        ({"text": ["a"]}, {}, "none of the columns text is 'question'"),
        ({"question": ["a"]}, dict(fields={"questin": "question"}), r"\['questin'\] are none of"),
        (
            {"question": ["a"]},
            dict(fields="question"),
            "fields is 'question'; give columns by what",
        ),
        ({"question": ["a"]}, dict(fields={"answer": "b"}), r"no columns \['b'\]; the columns are"),
        ({"question": ["a"], "img": [b""]}, {}, r"only the column 'img'; .*={'image': 'img'}, and"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, options, says):
    with pytest.raises(MMJaxError, match=says):
        ParquetSource(write(tmp_path / "a.parquet", columns), **options)


def test_pictures_in_a_column_of_another_name_are_named_or_passed_over(tmp_path):
    path = write(tmp_path / "a.parquet", {"question": ["a"], "img": [png(3)], "video": ["v.mp4"]})
    assert ParquetSource(path, {"image": "img"})[0].images == (png(3),)
    assert ParquetSource(path, {"image": None})[0].images == ()
    path = write(tmp_path / "b.parquet", vqa(1))
    assert ParquetSource(path, {"image": None})[0].images == ()


def test_files_that_are_none(tmp_path):
    with pytest.raises(MMJaxError, match="no such file or folder"):
        ParquetFiles(tmp_path / "a.parquet")
    with pytest.raises(MMJaxError, match="no file matches this pattern"):
        ParquetFiles(tmp_path / "train-*.parquet")
    with pytest.raises(MMJaxError, match=r"holds no file \*.parquet"):
        ParquetFiles(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(MMJaxError, match="cannot be read as parquet"):
        ParquetFiles(tmp_path / "a.parquet")
    write(tmp_path / "a.parquet", {"x": [1]})
    write(tmp_path / "b.parquet", {"y": [1]})
    with pytest.raises(MMJaxError, match=r"has the columns \['y'\], and a.parquet has \['x'\]"):
        ParquetFiles(tmp_path)


def test_base64_of_both_alphabets():
    data = bytes(range(256))
    standard = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4v"
    assert decode_base64(standard, "x") == data[:48]
    for text in ("-_-_", "+/+/", "+/\n+/", "data:image/png;base64,+/+/"):
        assert decode_base64(text, "x") == b"\xfb\xff\xbf"
    assert decode_base64("-w", "x") == decode_base64("+w==", "x") == b"\xfb"
    for text in ("!?", "ä", "", None, "A"):
        with pytest.raises(BadSample, match="here: "):
            decode_base64(text, "here")


def test_a_folder_of_many_files_keeps_few_of_them_open(tmp_path):
    for k in range(80):
        rows = {name: values[:2] for name, values in vqa(2).items() if name != "image"}
        write(tmp_path / f"{k:03}.parquet", rows | {"question": [f"{k}.0?", f"{k}.1?"]})

    def held():
        links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(link).startswith(str(tmp_path)) for link in links)

    source = ParquetSource(tmp_path)
    assert 0 < held() <= 64 < 80
    for row in (159, 0, 81, 0, *range(160)):  # those that were closed are opened again
        assert source[row].messages[0].text == f"{row // 2}.{row % 2}?"
        assert held() <= 64
