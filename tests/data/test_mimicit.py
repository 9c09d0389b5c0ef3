"""MIMIC-IT datasets and their training YAML, read from real files."""

import base64
import collections
import io
import json
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stub_processor import StubProcessor, text_of

from mmjax.data.catalog import make_source, make_sources
from mmjax.data.images import load_rgb
from mmjax.data.mimicit import MimicitSource, open_images
from mmjax.data.mimicit_yaml import expand_yaml
from mmjax.data.mixture import Mixture
from mmjax.data.pipeline import make_train_iterator
from mmjax.data.templates import fuyu_chat
from mmjax.types import BadSample, Message, MMJaxError


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def entry(number, images=None, related=(), **more):
    images = [f"LA_IMG_{number}"] if images is None else images
    return {
        "instruction": f"What is {number}?",
        "answer": f"It is {number}.",
        "image_ids": images,
        "rel_ins_ids": list(related),
    } | more


def write_images(path, ids, alphabet=base64.b64encode, group=2, index="__index_level_0__"):
    """A parquet file as pandas writes it: the index is a column that the metadata names."""
    table = pa.table(
        {
            "base64": [alphabet(png(int(i.rsplit("_", 1)[1]))).decode() for i in ids],
            index: ids,
        }
    )
    pandas = {"index_columns": [index], "columns": [], "pandas_version": "2.2.0"}
    if index == "__index_level_0__":
        table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
    pq.write_table(table, path, row_group_size=group)
    return path


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8")
    return path


def instructions(path, entries):
    return write(path, {"meta": {"version": "0.0.1", "data": {}}, "data": entries})


@pytest.fixture
def folder(tmp_path):
    """Five entries with an image each; the last two have related ones."""
    entries = {f"LA_INS_{i}": entry(i) for i in range(3)}
    entries["LA_INS_3"] = entry(3, related=["LA_INS_0", "LA_INS_1"])
    entries["LA_INS_ü"] = entry(4, ["LA_IMG_4", "LA_IMG_2"], ["LA_INS_3"], answer="Fünf — 五.")
    instructions(tmp_path / "ins.json", entries)
    write_images(tmp_path / "images.parquet", [f"LA_IMG_{i}" for i in (4, 0, 2, 3, 1)])
    return tmp_path


def red(image):
    return int(load_rgb(image)[0, 0, 0])


@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("form", ["parquet", "folder", "column id", "json"])
def test_images_in_every_form(folder, form, alphabet):
    ids = [f"LA_IMG_{i}" for i in (4, 0, 2, 3, 1)]
    path = folder / "images.parquet"
    if form == "folder":
        path = folder / "many"
        path.mkdir()
        write_images(path / "part.0.parquet", ids[:3], alphabet)
        write_images(path / "part.1.parquet", ids[3:], alphabet)
    elif form == "json":
        path = folder / "images.json"
        write(path, {i: alphabet(png(int(i[-1]))).decode() for i in ids})
    else:
        index = "id" if form == "column id" else "__index_level_0__"
        write_images(path, ids, alphabet, index=index)
    opened = MimicitSource(folder / "ins.json", path)
    for source in (opened, pickle.loads(pickle.dumps(opened))):
        assert len(source) == source.draws == 5
        assert [red(source[i].images[0]) for i in range(5)] == [0, 1, 2, 3, 4]
    assert source[1].messages == (Message("user", "What is 1?"), Message("assistant", "It is 1."))
    meta = source[4].meta
    assert (meta["id"], meta["answers"]) == ("LA_INS_ü", ["Fünf — 五."])
    text = (folder / "ins.json").read_text("utf-8")
    assert meta["line"] == 1 + text[: text.index('"LA_INS_ü"')].count("\n")
    assert [red(i) for i in source[4].images] == [4, 2]


def test_the_index_is_built_once_and_again_when_files_change(folder, monkeypatch):
    args = folder / "ins.json", folder / "images.parquet"
    MimicitSource(*args, populate_rel_ins=True)
    with monkeypatch.context() as patched:
        for name in ("keyed_json.index_object", "parquet.ParquetFiles.column"):
            patched.setattr(f"mmjax.data.{name}", lambda *a: pytest.fail("built again"))
        again = MimicitSource(*args, populate_rel_ins=True)
    assert red(again[3].images[0]) == 3
    instructions(args[0], {"LA_INS_9": entry(2)})
    assert MimicitSource(*args)[0].meta["id"] == "LA_INS_9"


def test_related_entries_are_turns_or_examples(folder):
    args = folder / "ins.json", folder / "images.parquet"
    assert len(MimicitSource(*args)[3].messages) == 2
    turns = MimicitSource(*args, populate_rel_ins=True)[3]
    assert [m.text for m in turns.messages] == [
        *("What is 0?", "It is 0.", "What is 1?", "It is 1.", "What is 3?", "It is 3.")
    ]
    assert [red(i) for i in turns.images] == [3]
    context = dict(group="IMAGE_TEXT_IN_CONTEXT")
    examples = MimicitSource(*args, populate_rel_ins=True, **context)[3]
    assert [red(i) for i in examples.images] == [0, 1, 3]
    assert [m.text for m in examples.messages[::2]] == [f"<image>What is {i}?" for i in (0, 1, 3)]
    kinds = [s.value if s.kind == "image" else s.kind for s in fuyu_chat(examples)]
    assert [k for k in kinds if isinstance(k, int)] == [0, 1, 2]
    train = write(folder / "train.json", {"LA_INS_1": ["LA_INS_2"], "LA_INS_0": []})
    chosen = MimicitSource(*args, train, **context)
    assert [red(i) for i in chosen[0].images] == [2, 1]
    assert [chosen[i].meta["id"] for i in range(len(chosen))] == ["LA_INS_1", "LA_INS_0"]
    assert [len(chosen[i].messages) for i in range(2)] == [4, 2]
    assert chosen.draws == 2 and MimicitSource(*args, train, num_samples=5).draws == 5
    random.seed(0)
    one = random.sample(["LA_INS_1", "LA_INS_0"], 1)
    assert [MimicitSource(*args, train, num_samples=1)[0].meta["id"]] == one
    for named, says in (({"LA_INS_8": []}, "1 of its 1 entries .*'LA_INS_8' .*nearest"),
                        ({}, "names no entry")):  # fmt: skip
        with pytest.raises(MMJaxError, match=says):
            MimicitSource(*args, write(folder / "wrong.json", named))


def test_frames_are_spread_and_text_has_no_images(folder):
    frames = [f"LA_IMG_{i % 5}" for i in range(9)]
    path = instructions(folder / "video.json", {"V": entry(0, frames)})
    video = MimicitSource(path, folder / "images.parquet", group="VIDEO_TEXT", max_frames=3)
    assert [red(i) for i in video[0].images] == [0, 4, 3]  # frames 0, 4 and 8
    assert len(MimicitSource(path, folder / "images.parquet", group="VIDEO_TEXT")[0].images) == 9
    text = MimicitSource(path, group="TEXT_ONLY")[0]
    assert text.images == () and len(text.messages) == 2


def test_a_medium_holds_the_frames_of_an_entry(folder):
    ids = [f"LA_IMG_{i % 5}" for i in range(9)]
    entries = {
        "V": entry(0, ids),
        "P": entry(1, ids[1:3]),
        "S": entry(2, ids[2:3]),
        "T": entry(3, []),
    }
    args = instructions(folder / "video.json", entries), folder / "images.parquet"
    kept = dict(frames_as="medium")

    def found(group, **options):
        source = MimicitSource(*args, group=group, **(kept | options))
        media = [source[i].images for i in range(4)]
        for record in (source[0], source[1]):  # no mark, or one for the medium and not for a frame
            assert sum(m.text.count("<image>") for m in record.messages) in (0, len(record.images))
        return [[[red(f) for f in m] if isinstance(m, tuple) else red(m) for m in x] for x in media]

    # Two pictures are a pair, as SD's and CGD's; one stays a picture; without any there is none.
    assert found("IMAGE_TEXT") == [[[0, 1, 2, 3, 4, 0, 1, 2, 3]], [[1, 2]], [2], []]
    # A video has always as many frames as the model: 0, 2, 5 and 8 of nine; few are repeated.
    four = [[[0, 2, 0, 3]], [[1, 1, 1, 2]], [[2, 2, 2, 2]], []]
    assert found("VIDEO_TEXT", frames=4) == found("VIDEO_TEXT", max_frames=4) == four
    assert [len(x[0]) for x in found("VIDEO_TEXT")[:3]] == [32, 32, 32]
    assert found("VIDEO_TEXT", frames=1) == [[0], [1], [2], []]
    # In images the default is what there is.
    assert found("VIDEO_TEXT", frames_as="images", frames=4)[1] == [1, 1, 1, 2]
    assert found("VIDEO_TEXT", frames_as="images")[1] == [1, 2]
    assert found("TEXT_ONLY") == [[], [], [], []]


def test_examples_in_context_have_a_medium_each(folder):
    entries = {"A": entry(0), "B": entry(1, ["LA_IMG_1", "LA_IMG_2"], ["A"])}
    entries["T"] = entry(3, [], ["A"])
    path = instructions(folder / "pairs.json", entries)
    options = dict(group="IMAGE_TEXT_IN_CONTEXT", populate_rel_ins=True)
    args = path, folder / "images.parquet"
    medium = MimicitSource(*args, **options, frames_as="medium")[1]
    assert [m.text for m in medium.messages[::2]] == ["<image>What is 0?", "<image>What is 1?"]
    assert red(medium.images[0]) == 0 and [red(f) for f in medium.images[1]] == [1, 2]
    assert medium.meta["image_ids"] == ["LA_IMG_0", "LA_IMG_1", "LA_IMG_2"]
    text = MimicitSource(*args, **options, frames_as="medium")[2]
    assert text.messages[2].text == "What is 3?" and len(text.images) == 1
    images = MimicitSource(*args, **options)[1]
    assert images.messages[2].text == "<image><image>What is 1?" and len(images.images) == 3
    pairs = MimicitSource(*args, **options, frames_as="medium", frames=2)[1]
    assert [[red(f) for f in m] for m in pairs.images] == [[0, 0], [1, 2]]


@pytest.mark.parametrize("count, length, draws", [(-1, 5, 5), (0, 5, 5), (5, 5, 5), (12, 5, 12)])
def test_num_samples_takes_all_or_asks_for_more(folder, count, length, draws):
    source = MimicitSource(folder / "ins.json", folder / "images.parquet", num_samples=count)
    assert (len(source), source.draws) == (length, draws)
    assert [source[i].meta["id"] for i in range(3)] == [f"LA_INS_{i}" for i in range(3)]
    assert Mixture.of({"a": source}).counts == (draws,)


def test_fewer_samples_are_those_that_otter_takes(folder):
    names = [f"LA_INS_{i}" for i in range(4)] + ["LA_INS_ü"]
    random.seed(0)
    wanted = random.sample(names, 3)
    args = folder / "ins.json", folder / "images.parquet"
    source = MimicitSource(*args, num_samples=3, seed=7)
    assert [r.meta["id"] for r in (source[0], source[1], source[2])] == wanted
    with pytest.raises(IndexError):
        source[3]


def test_a_task_description_is_drawn_by_seed_and_entry(folder):
    args = folder / "ins.json", folder / "images.parquet"
    lines = [f"Task {i}." for i in range(4)]
    told = {}
    for seed in (0, 1, 0):
        source = MimicitSource(*args, task_description=lines, seed=seed)
        found = [source[i].messages[0] for i in range(5)]
        assert all(m.role == "system" and m.text in lines for m in found)
        assert told.setdefault(seed, found) == found
    assert told[0] != told[1] and len({m.text for m in told[0]}) > 1
    one = MimicitSource(*args, task_description="Look.")[2]
    texts = [s.value for s in fuyu_chat(one) if s.kind == "text"]
    assert texts[0] == "Look.\nUser:What is 2? Assistant:"


def test_symbols_are_kept_unless_asked(folder):
    text = 'a+b=c; `x` [1] {2} <3> it\'s (5) "q"?!'
    around = dict(instruction=f" {text}\n", answer=f"\n\t{text} \r\n")
    path = instructions(folder / "t.json", {"T": entry(0, [], **around)})
    assert [m.text for m in MimicitSource(path)[0].messages] == [text, text]
    stripped = MimicitSource(path, keep_symbols=False)[0]
    assert {m.text for m in stripped.messages} == {'abc x 1 2 3 it\'s (5) "q"?!'}


def test_symbols_at_the_ends_leave_what_otters_own_code_leaves(folder):
    """A space beside one stays of an answer alone; a Windows line end goes with it."""
    around = dict(instruction=" - Why? *\r\n", answer="- Red *\r\n")
    path = instructions(folder / "t.json", {"T": entry(0, [], **around)})
    stripped = MimicitSource(path, keep_symbols=False)[0]
    assert [m.text for m in stripped.messages] == ["Why?", " Red "]


@pytest.mark.parametrize(
    "entries, options, says",
    [
        ({"A": entry(7)}, {}, r"1 image ids have no image .*'LA_IMG_7' of entry 'A' \(the nearest"),
        ({"A": entry(7)}, dict(images_path=None), "1 of 1 entries have image_ids .*TEXT_ONLY"),
        ({}, {}, "'data' holds no entry"),
        ({"A": entry(1, related=["B"])}, dict(populate_rel_ins=True), "1 related ids .* first 'B'"),
        ({"A": entry(1)}, dict(group="IMAGE_TXT"), "'IMAGE_TXT'.*IMAGE_TEXT, TEXT_ONLY"),
        ({"A": entry(1)}, dict(num_samples=-2), "num_samples -2"),
        ({"A": entry(1)}, dict(frames_as="video"), "frames_as 'video'.*images or medium"),
        ({"A": entry(1)}, dict(frames=0), "frames 0"),
        ({"A": entry(1)}, dict(task_description=["a", 3]), r"task_description is \['a', 3\]"),
        ({"A": entry(1)}, dict(task_description=3), "task_description is 3; expected texts"),
        ({"A": entry(1)}, dict(images_path="x.tar"), "x.tar: images are a .parquet"),
        ({"A": entry(1)}, dict(images_path="gone.parquet"), "gone.parquet: no such file"),
    ],
)
def test_what_is_wrong_as_a_whole_is_said_when_opened(folder, entries, options, says):
    path = instructions(folder / "bad.json", entries)
    with pytest.raises(MMJaxError, match=says):
        MimicitSource(path, **({"images_path": folder / "images.parquet"} | options))


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"data": {"A": {}, "B": {}, "A": {}}}', "1 ids are given more than once: 'A'"),
        ('{"meta": {}, "dat": {}}', r"no member 'data' \(found meta, dat\)"),
        ('{"data": {"A": {},\n "B": {"instruction": }}}', ":2: not JSON"),
        ('{"data": {"A": {}', "expected ',' or '}' behind an entry"),
        ('{"data": {"A": ' + "[" * 100_000, ":1: not JSON .*recursion"),
        ("[1]", "expected an object of entries by id"),
        ('{"data": [1]}', "expected an object of entries by id"),
    ],
)
def test_broken_instructions_are_named_with_their_line(tmp_path, text, says):
    (tmp_path / "ins.json").write_text(text)
    with pytest.raises(MMJaxError, match=says):
        MimicitSource(tmp_path / "ins.json", group="TEXT_ONLY")


def test_images_in_two_objects_behind_one_another_are_refused(tmp_path):
    path = tmp_path / "images.json"
    path.write_text('{"I_1": "QUJD",}\n')
    assert len(open_images(path)) == 1
    path.write_text('{"I_1": "QUJD"}\n{"I_2": "QUJD"}\n')
    with pytest.raises(MMJaxError, match=r"images.json:2: .* stands behind the object"):
        open_images(path)


def test_a_file_that_was_first_opened_as_images_is_read_as_instructions(tmp_path):
    path = instructions(tmp_path / "ins.json", {"A": entry(7, [])})
    assert len(open_images(path)) == 2  # 'meta' and 'data'
    (record,) = MimicitSource(path, group="TEXT_ONLY")
    assert record.messages[-1].text == "It is 7."


def test_the_working_directory_is_a_folder_of_images(folder, monkeypatch):
    (folder / "images").mkdir()
    write_images(folder / "images" / "a.parquet", ["I_1"])
    monkeypatch.chdir(folder / "images")
    assert len(open_images(".")) == 1
    assert sorted(p.name for p in folder.iterdir() if "index" in p.name) == [".images.index.npz"]


def test_images_given_twice_or_without_columns(folder):
    path = write_images(folder / "twice.parquet", ["I_1", "I_2", "I_1"])
    with pytest.raises(MMJaxError, match="1 image ids are given more than once, first 'I_1'"):
        MimicitSource(folder / "ins.json", path)
    for columns in (["picture"], ["id", "picture"], ["base64"]):
        pq.write_table(pa.table({name: ["x"] for name in columns}), folder / "other.parquet")
        with pytest.raises(MMJaxError, match="image files need 'base64' and the ids") as error:
            MimicitSource(folder / "ins.json", folder / "other.parquet")
        assert f"has the columns {columns}" in str(error.value)


def test_one_bad_entry_is_a_bad_sample(folder):
    entries = {"A": entry(1, answer=None), "B": entry(7), "C": "text", "D": entry(1, "LA_IMG_1")}
    path = instructions(folder / "bad.json", entries)
    text = path.read_text().split("\n")
    source_lines = [next(n for n, x in enumerate(text, 1) if f'"{e}":' in x) for e in entries]
    source = MimicitSource(path, folder / "images.parquet", missing="skip")
    wanted = ["'answer' is missing", "'LA_IMG_7' is not in", "'instruction' is missing", "no list"]
    for i, says in enumerate(wanted):
        with pytest.raises(BadSample, match=says) as error:
            source[i]
        assert error.value.reason == ("missing_image" if i == 1 else "bad_record")
        meta = error.value.meta
        assert (meta["id"], meta["source"], meta["line"]) == ("ABCD"[i], str(path), source_lines[i])
    write(folder / "i.json", {"LA_IMG_1": "!!!", "LA_IMG_7": 5})
    source = MimicitSource(path, folder / "i.json", missing="skip")
    with pytest.raises(BadSample, match="is no base64 text"):
        source[1]


def test_an_outline_has_the_texts_and_as_many_images_and_opens_none(folder):
    source = MimicitSource(folder / "ins.json", folder / "images.parquet", populate_rel_ins=True)
    want = [source[i] for i in range(5)]
    (folder / "images.parquet").unlink()
    source = pickle.loads(pickle.dumps(source))
    with pytest.raises(MMJaxError):
        source[4]
    for i in range(5):
        first, (found,) = source.outlines(i)
        assert first == i and (found.messages, found.meta) == (want[i].messages, want[i].meta)
        assert len(found.images) == len(want[i].images) > 0


def test_an_entry_that_is_not_utf8_is_a_bad_sample(folder):
    """It ended the run with a traceback, before anything of the file was read."""
    path = instructions(folder / "ins.json", {"A": entry(1, answer="caf\u00e9"), "B": entry(2)})
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xe9"))
    source = MimicitSource(path, folder / "images.parquet")
    assert len(source) == 2 and source[1].meta["id"] == "B"
    with pytest.raises(BadSample, match=r"ins.json:\d+: cannot be read as JSON: .*0xe9"):
        source[0]
    path.write_bytes(path.read_bytes().replace(b'"A"', b'"\xc4"'))
    with pytest.raises(MMJaxError, match=r"ins.json:\d+: an id or its entry is not UTF-8"):
        MimicitSource(path, folder / "images.parquet")


YAML = """
IMAGE_TEXT:
  LADD:
    mimicit_path: ins.json
    images_path: images.parquet
    num_samples: 2
    task_description: ["Look.", "See."]
TEXT_ONLY:
  LIMA:
    mimicit_path: ins.json
    images_path:
"""


def test_a_training_yaml_becomes_named_sources(folder):
    (folder / "train.yaml").write_text(YAML)
    specs = {
        "otter": dict(kind="mimicit_yaml", path=str(folder / "train.yaml"), keep_symbols=False),
        "more": dict(kind="magnifier", split="train"),
    }
    sources = make_sources(specs)
    assert [(name, len(sources[name])) for name in list(sources)[:2]] == [("LADD", 2), ("LIMA", 5)]
    assert list(sources) == ["LADD", "LIMA", "more"]
    assert sources["LIMA"][0].images == () and not sources["LIMA"].keep_symbols
    assert sources["LADD"][0].messages[0].role == "system"
    plain = expand_yaml(folder / "train.yaml", with_task_description=False)
    assert "task_description" not in plain["LADD"] and plain["LADD"]["group"] == "IMAGE_TEXT"
    with pytest.raises(MMJaxError, match="two data sources are called 'LADD'"):
        make_sources(specs | {"LADD": specs["more"]})
    with pytest.raises(MMJaxError, match="stands for several sources"):
        make_source(specs["otter"])


def test_a_yaml_may_merge_what_its_datasets_share(folder):
    (folder / "train.yaml").write_text(
        "IMAGE_TEXT:\n"
        "  A: &a {mimicit_path: ins.json, images_path: images.parquet, num_samples: 2}\n"
        "  B: &b {<<: *a, num_samples: 3}\n"
        "VIDEO_TEXT:\n"
        "  C: *b\n"
    )
    specs = expand_yaml(folder / "train.yaml")
    assert {name: spec["num_samples"] for name, spec in specs.items()} == {"A": 2, "B": 3, "C": 3}
    assert {spec["images_path"] for spec in specs.values()} == {str(folder / "images.parquet")}
    assert [len(source) for source in make_sources(specs).values()] == [2, 3, 3]


def test_everything_wrong_in_a_yaml_is_said_at_once(folder):
    (folder / "train.yaml").write_text(
        YAML.replace("TEXT_ONLY", "TXT_ONLY")
        .replace("images_path: images.parquet", "image_path: images.parquet")
        .replace("num_samples: 2", "num_samples: all")
        .replace("ins.json", "inz.json")
    )
    with pytest.raises(MMJaxError) as error:
        expand_yaml(folder / "train.yaml")
    lines = str(error.value).splitlines()
    for line, part in zip(
        lines,
        [
            "train.yaml:",
            "LADD: mimicit_path 'inz.json' does not exist; did you mean 'ins.json'?",
            "LADD: unknown key 'image_path'; did you mean 'images_path'?",
            "LADD: num_samples is 'all'",
            "unknown group 'TXT_ONLY'; did you mean 'TEXT_ONLY'?",
        ],
        strict=True,
    ):
        assert part in line


@pytest.mark.parametrize(
    "text, says",
    [
        ("IMAGE_TEXT: {}", "no group holds a dataset"),
        ("", "expected groups"),
        ("a: [", "cannot be read as YAML"),
        ("TEXT_ONLY:\n  A: {mimicit_path: ins.json}\n  A: {}", "'A' is given twice"),
        ("TEXT_ONLY:\n  A: {num_samples: 3}", "A: mimicit_path is missing"),
        ("TEXT_ONLY:\n  A: 3", "TEXT_ONLY.A: expected keys"),
        ("TEXT_ONLY:\n  A: {mimicit_path: " + "a" * 300 + "}", "a' does not exist"),
        (
            "IMAGE_TEXT:\n  2023: {mimicit_path: ins.json}\n"
            "TEXT_ONLY:\n  2023: {mimicit_path: ins.json}",
            "TEXT_ONLY.2023: there is another dataset '2023'",
        ),
        ("? [A, B]\n: 1", "found unhashable key"),
        ("TEXT_ONLY:\n  A: {<<: {a: 1}, num_samples: 3, num_samples: 4}", "is given twice"),
    ],
)
def test_yaml_that_is_none(folder, text, says):
    with pytest.raises(MMJaxError, match="ins.json: is no training YAML.*by another kind"):
        expand_yaml(folder / "ins.json")
    (folder / "train.yaml").write_text(text)
    with pytest.raises(MMJaxError, match=says):
        expand_yaml(folder / "train.yaml")


@pytest.mark.heavy
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mixture_of_formats_trains_with_and_without_workers(folder, num_workers):
    rows = [{"input": f"Hm {i}?", "output": f"Ha {i}."} for i in range(3)]
    (folder / "train.yaml").write_text(YAML)
    write(folder / "rows.json", rows)
    sources = make_sources(
        {
            "otter": dict(kind="mimicit_yaml", path=str(folder / "train.yaml")),
            "flamingo": dict(kind="json", path=str(folder / "rows.json")),
        }
    )
    batches = make_train_iterator(
        Mixture.of(sources, counts={"LADD": -1, "LIMA": -1, "flamingo": 6}),
        "fuyu_chat",
        StubProcessor(),
        **dict(seq_len=96, max_patches=12, max_targets=40, batch_size=2),
        epochs=1,
        num_workers=num_workers,
    )
    found = collections.Counter()
    for batch in batches:
        for tokens, index in zip(batch["tokens"], batch["target_index"], strict=True):
            # An end token, 3, closes each answer.
            ends = [int(i) for i in index if i >= 0 and tokens[i] == 3]
            starts = [-1, *ends]
            for a, b in zip(starts, ends, strict=False):
                found[text_of(tokens[[i for i in index if a < i < b]])] += 1
    batches.close()
    assert found == {
        **{f"Ha {i}.": 2 for i in range(3)},
        **{"It is 0.": 1, "It is 1.": 1, "It is 2.": 1, "Fünf — 五.": 2, "It is 3.": 2},
    }


def test_a_wrong_dataset_is_named_by_its_source(folder):
    instructions(folder / "ins.json", {"A": entry(9)})
    spec = dict(kind="mimicit", mimicit_path=str(folder / "ins.json"))
    spec["images_path"] = str(folder / "images.parquet")
    with pytest.raises(MMJaxError, match=r"data\.sources\.coco: .*1 image ids have no image"):
        make_sources({"coco": spec})
