import errno
import json
import os
import pickle
import re
import subprocess
import sys

import pytest

from mmjax.data import index_cache, jsonl
from mmjax.data.easyvqa import ANSWERS, EasyVQASource
from mmjax.data.skips import Skip
from mmjax.data.sources import JsonSource
from mmjax.evals.few_shot import Demonstrations
from mmjax.types import BadSample, Message, MMJaxError

GOOD = {
    "id": "a1",
    "image": "x.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhät?"},
        {"from": "gpt", "value": "A cät \u2028."},
    ],
}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def test_json_array_and_jsonl_give_the_same_records(tmp_path):
    items = [GOOD | {"id": f"r{i}"} for i in range(5)]
    array = write(tmp_path / "a.json", json.dumps(items, indent=1, ensure_ascii=False))
    text = "\n".join(json.dumps(i, ensure_ascii=False) for i in items[:3])
    lines = write(
        tmp_path / "b.jsonl", text + "\n\n \n" + json.dumps(items[3]) + "\n" + json.dumps(items[4])
    )
    a, b = JsonSource(array, image_root=tmp_path), JsonSource(lines, image_root=tmp_path)
    assert len(a) == len(b) == 5
    assert len(JsonSource(write(tmp_path / "A.JSON", array.read_text("utf-8")))) == 5
    for i in (4, 0, 2):
        assert a[i].messages == b[i].messages
        assert a[i].messages == (
            Message("user", "<image>\nWhät?"),
            Message("assistant", "A cät \u2028."),
        )
        assert a[i].images == b[i].images == (f"{tmp_path}/x.png",)
        assert a[i].meta["id"] == b[i].meta["id"] == f"r{i}"
    assert [b[i].meta["line"] for i in range(5)] == [1, 2, 3, 6, 7]
    assert (
        a[1].meta["line"]
        == 1 + array.read_text("utf-8")[: array.read_text("utf-8").index('"r1"')].count("\n") - 1
    )
    assert pickle.loads(pickle.dumps(b))[3].messages == b[3].messages


@pytest.mark.parametrize("name", ["away", "a.json"])
def test_an_image_root_that_is_no_folder_is_told_at_once(tmp_path, name):
    file = write(tmp_path / "a.json", [GOOD])
    says = f"image_root {tmp_path / name}: no such folder.*leave it away where that is {tmp_path}$"
    with pytest.raises(MMJaxError, match=says):
        JsonSource(file, image_root=tmp_path / name)


def test_other_forms_and_image_fields(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    items = [
        {"messages": chat, "images": ["a.png", "b.png"]},
        {"question": "q?", "answers": ["x", "y"], "image": None, "group": "g"},
        {"question": "q?"},
        {"question": "q?", "answer": "z", "answers": None},
        {"question": "q?", "answer": 3},
    ]
    s = JsonSource(write(tmp_path / "a.json", items))
    assert [m.role for m in s[0].messages] == ["system", "user"]
    assert s[0].images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert s[1].messages[1].text == "x" and s[1].meta["answers"] == ["x", "y"]
    assert s[1].meta["group"] == "g" and s[1].images == ()
    assert len(s[2].messages) == 1 and "answers" not in s[2].meta
    assert s[3].messages[1].text == "z"
    with pytest.raises(BadSample, match="field 'answer' is 3, not a string"):
        s[4]


def test_content_may_be_a_list_of_parts(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}, {"type": "image", "text": None}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "this"}]}
    items = [
        {"messages": [{"role": "user", "content": parts}, answer], "images": ["a", "b"]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, answer]},
    ]
    s = JsonSource(write(tmp_path / "a.json", items))
    assert [m.text for m in s[0].messages] == ["<image>what?<image>", "this"]
    with pytest.raises(BadSample, match=r"messages\[0\].content': a part is .*'audio'"):
        s[1]


def test_parts_may_name_their_pictures(tmp_path):
    """As datasets for Qwen2-VL, transformers' chats and OpenAI's interface have them."""
    answer = {"role": "assistant", "content": "this"}

    def asked(*parts, **more):
        text = {"type": "text", "text": "what?"}
        return {"messages": [{"role": "user", "content": [*parts, text]}, answer], **more}

    items = [
        asked({"type": "image", "image": "a.png"}, {"type": "image", "path": "/b.png"}),
        asked({"type": "image_url", "image_url": {"url": "file:///c.png"}, "image": None}),
        asked({"type": "image", "image": "a.png"}, {"type": "image"}),
        asked({"type": "image", "image": "a.png"}, image="b.png"),
        asked({"type": "image", "url": "https://example.org/a.png"}),
        asked({"type": "image", "image": "a.png", "path": "b.png"}),
        asked({"type": "image_url"}),
    ]
    s = JsonSource(write(tmp_path / "a.json", items))
    assert s[0].images == (str(tmp_path / "a.png"), "/b.png")
    assert s[0].messages[0].text == "<image><image>what?"
    assert s[1].images == ("/c.png",) and s[1].messages[0].text == "<image>what?"
    for i, says in enumerate(
        [
            "names the files of 1 pictures and leaves out those of 1; name all of them, or none",
            "pictures stand in 'messages' and in a field of their own; keep one",
            "a picture is 'https://example.org/a.png'; expected the name of one file",
            r"a picture is \['a.png', 'b.png'\]; expected the name of one file",
            r"a picture is \[\]; expected the name of one file",
        ],
        2,
    ):
        with pytest.raises(BadSample, match=says):
            s[i]


@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_turns_are_told_by_their_fields_not_by_the_name_of_their_list(tmp_path, form):
    """MiniCPM-V's conversations have roles and contents; some call LLaVA's turns messages."""
    wanted = (Message("user", "<image>q"), Message("assistant", "a"))
    chat = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    llava = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    items = [{form: turns, "image": "a.png"} for turns in (chat, llava, [chat[0], llava[1]])]
    s = JsonSource(write(tmp_path / "a.json", items))
    assert s[0].messages == s[1].messages == wanted
    with pytest.raises(BadSample, match=rf"{form}\[1\].role' is missing"):
        s[2]


def test_images_named_inside_the_text(tmp_path):
    named = "<img_path>a b.png<img_path>Which is older, this or <img_path>/abs/c.png<img_path>?"
    items = [
        {"input": named, "output": "The first."},
        {"instruction": "Think. ", "input": "Why?", "output": "So.", "id": "x"},
        {"input": "<img_path>a.png", "output": "o"},
        {"input": "<img_path> <img_path>", "output": "o"},
        {"input": "<image>", "output": "o"},
        {"input": 3, "output": "o"},
        {"instruction": "<image>What?", "input": "", "output": "A cat.", "image": "a.png"},
        {"input": "What?", "output": "Two.", "images": ["a.png", "b.png"]},
        {"input": "<image><image>", "output": "o", "image": "a.png"},
        {"input": "<img_path>a.png<img_path><image>", "output": "o", "image": "a.png"},
    ]
    s = JsonSource(write(tmp_path / "a.json", items), image_root=tmp_path)
    assert s[0].messages == (
        Message("user", "<image>Which is older, this or <image>?"),
        Message("assistant", "The first."),
    )
    assert s[0].images == (f"{tmp_path}/a b.png", "/abs/c.png") and s[0].meta["answers"] == [
        "The first."
    ]
    assert s[1].messages[0].text == "Think. Why?" and s[1].images == ()
    # LLaMA-Factory's files: the same texts, and the pictures in a field of their own.
    assert (s[6].messages[0].text, s[6].images) == ("<image>What?", (f"{tmp_path}/a.png",))
    assert s[7].images == (f"{tmp_path}/a.png", f"{tmp_path}/b.png")
    with pytest.raises(BadSample, match=r"2 <image> mark\(s\) in 'input' for 1 image"):
        s[8]
    with pytest.raises(BadSample, match="a bare <image>"):
        s[9]
    wanted = ["holds 1 <img_path> marks", "an empty file name", "a bare <image>", "'input' is 3"]
    for i, says in enumerate(wanted):
        with pytest.raises(BadSample, match=says):
            s[2 + i]


@pytest.mark.parametrize("chunk", [3, 1 << 24])
def test_index_is_cached_and_rebuilt_when_the_file_changes(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    path = write(tmp_path / "a.jsonl", '{"question": "a"}\n{"question": "b"}\n')
    index_dir = tmp_path / "index"
    assert len(JsonSource(path, index_dir=index_dir)) == 2
    assert len(list(index_dir.iterdir())) == 1 and not list(tmp_path.glob(".*"))
    with monkeypatch.context() as patched:
        patched.setattr(jsonl, "index_lines", lambda path: pytest.fail("the cache was not used"))
        assert len(JsonSource(path, index_dir=index_dir)) == 2
    stat = path.stat()
    write(path, '{"question": "a"}\n{"question":\n"b"}')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert len(JsonSource(path, index_dir=index_dir)) == 3
    next(index_dir.iterdir()).write_bytes(b"PK damaged")
    assert len(JsonSource(path, index_dir=index_dir)) == 3


def turns(*pairs):
    return {"conversations": [{"from": who, "value": what} for who, what in pairs]}


def test_a_damaged_index_is_made_anew(tmp_path):
    """A byte that says how an entry is packed, or how long its comment is, ended the run."""
    path = write(tmp_path / "a.jsonl", '{"question": "a"}\n{"question": "b"}\n')
    assert len(JsonSource(path)) == 2
    index = tmp_path / ".a.jsonl.index.npz"
    good = index.read_bytes()
    directory = [m.start() for m in re.finditer(b"PK\x01\x02", good)]
    for entry in directory:
        for at in (6, 8, 10, 11, 32, 33):  # version, flags, method, length of the comment
            raw = bytearray(good)
            raw[entry + at] ^= 0x5A
            index.write_bytes(raw)
            assert [r.messages[0].text for r in map(JsonSource(path).__getitem__, (0, 1))] == [
                *("a", "b")
            ]
    for length in range(0, len(good), 97):
        index.write_bytes(good[:length])
        assert len(JsonSource(path)) == 2
    assert len(directory) == 3 and index.read_bytes() == good


def test_an_answer_that_nothing_asked_for_is_left_out(tmp_path):
    """As LLaVA's loaders do: pieces of long conversations begin so."""
    led = turns(("gpt", "Hello."), ("human", "what?"), ("gpt", "this"))
    told = turns(("system", "Be brief."), ("gpt", "Hello."), ("human", "what?"), ("gpt", "this"))
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": roles[x["from"]], "content": x["value"]} for x in led["conversations"]]
    lines = [json.dumps(x) for x in (led, told, {"messages": chat})]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    first, second, third = JsonSource(path)
    question = (Message("user", "what?"), Message("assistant", "this"))
    assert first.messages == third.messages == question
    assert second.messages == (Message("system", "Be brief."), *question)
    # A picture that it marks is nobody's: the record is bad rather than its pictures moved.
    marked = turns(("gpt", "<image>"), ("human", "<image> what?"), ("gpt", "this"))
    path = write(tmp_path / "b.jsonl", json.dumps(marked | {"image": ["a.png", "b.png"]}))
    with pytest.raises(BadSample, match=r"1 <image> mark\(s\) .* for 2 image"):
        JsonSource(path)[0]


@pytest.mark.parametrize(
    "value, reason, message",
    [
        ({"conversation": []}, "bad_record", "is 'conversation' a slip"),
        ({}, "bad_record", "no field at all"),
        (GOOD | {"question": "q"}, "bad_record", "both conversations and question"),
        ({"conversations": "hi"}, "bad_record", "'conversations' is 'hi'"),
        ({"conversations": []}, "bad_record", "at least one turn"),
        ({"conversations": [{"from": "human"}]}, "bad_record", r"conversations\[0\].value' is mis"),
        (turns(("human", 3)), "bad_record", r"conversations\[0\].value' is 3, not a string"),
        (turns(("bot", "x")), "bad_record", r"conversations\[0\].from' is 'bot'; expected one of"),
        (turns(("gpt", "x")), "bad_record", "'conversations' holds an answer and no question"),
        (turns(("gpt", "x"), ("gpt", "y")), "bad_record", r"\[1\].from' is 'gpt' where 'human'"),
        (
            turns(("human", "x"), ("human", "y")),
            "bad_record",
            r"\[1\].from' is 'human' where 'gpt'",
        ),
        (turns(("human", "<image>")), "image_mismatch", r"1 <image> mark\(s\) .* for 0 image"),
        (GOOD | {"image": ["a", "b"]}, "image_mismatch", r"1 <image> mark\(s\) .* for 2 image"),
        (GOOD | {"image": 5}, "bad_record", "'image' holds 5"),
        (
            {"image_path": "a.jpg", "question": "q", "answer": "a"},
            "bad_record",
            "'image_path' is 'a.jpg', and pictures are read from 'image' or 'images' alone",
        ),
        (turns(("human", "x"), ("gpt", "y")) | {"video": "v.mp4"}, "bad_record", "'video' is 'v"),
        (GOOD | {"video": "v.mp4"}, "bad_record", "'video' is 'v.mp4', .* take 'video' out"),
        ({"question": "q", "image": None, "videos": ["v"]}, "bad_record", "take 'videos' out"),
        ({"question": 1}, "bad_record", "'question' is 1"),
        ([1], "bad_json", "expected one JSON object, got list"),
    ],
)
def test_a_bad_record_names_file_line_field_and_value(tmp_path, value, reason, message):
    path = write(tmp_path / "a.jsonl", "\n" + json.dumps(value))
    with pytest.raises(BadSample, match=f"a.jsonl:2: .*{message}") as error:
        JsonSource(path)[0]
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": 1, "id": 2}', "field 'id' is given twice"),
        ('{"id": }', "not JSON at column 8"),
        ('{"question": "cut o', "not JSON at column 14"),
        ('{"id": 1' + "0" * 5000 + "}", "cannot be read as JSON: .*4300 digits"),
        ('{"id": ' + "[" * 100_000, "cannot be read as JSON: .*recursion"),
    ],
)
def test_a_malformed_line_is_one_bad_sample(tmp_path, line, message):
    source = JsonSource(write(tmp_path / "a.jsonl", '{"question": "q"}\n' + line))
    assert source[0].messages[0].text == "q"
    with pytest.raises(BadSample, match=f"a.jsonl:2: {message}"):
        source[1]


def test_records_on_one_line_have_names_of_their_own(tmp_path):
    """As json.dump writes an array: its line names none of them, nor tells them apart."""
    rows = [{"question": "q", "answer": "a"}] * 3 + [{"id": None, "question": 4}, {"id": "x"}]
    source = JsonSource(write(tmp_path / "a.json", json.dumps(rows)))
    assert [source[i].meta["id"] for i in range(3)] == ["1", "2", "3"]
    assert Demonstrations(source, 2).before(source[0], 0).messages[-2].text == "q"
    for i, name in ((3, "4"), (4, "x")):
        with pytest.raises(BadSample, match=rf"a\.json:1 \(record {i + 1}\): ") as error:
            source[i]
        skip = Skip.of(pickle.loads(pickle.dumps(error.value)), "train", i)
        assert (skip.id, skip.source, skip.line) == (name, str(tmp_path / "a.json"), 1)


def test_what_cannot_be_read_is_listed_by_its_line_and_id(tmp_path):
    lines = '{"question": "q"}', "", '{"id": "b", "question": 1}', "{"
    source = JsonSource(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert source[0].meta["id"] == "1"
    for i, line, name in ((1, 3, "b"), (2, 4, "4")):
        with pytest.raises(BadSample, match=f"a.jsonl:{line}: ") as error:
            source[i]
        skip = Skip.of(error.value, "train", i)
        assert (skip.id, skip.source, skip.line) == (name, str(source.path), line)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1}', "a.json:1: expected a JSON array of records in UTF-8, found '{"),
        ("\n", "a.json: the file is empty; expected a JSON array of records"),
        ('[{"a": 1},\n {"a": }]', "a.json:2: not JSON at column 8"),
        ('[{"a": 1}\n {"a": 2}]', "a.json:2: expected ',' or ']' after record 1"),
        ('[{"a": 1},\n{"a": 2}', "a.json:2: expected ',' or ']' after record 2"),
        ('[{"a": 1},\n{"a": ' + "[" * 100_000, "a.json:2: record 2 cannot be read as JSON"),
        ('[{"a": 1}]\n[{"a": 2}]\n', "a.json:2: '[{\"a\": 2}]\\n' stands behind the array"),
    ],
)
def test_a_malformed_array_is_refused_when_opened(tmp_path, text, message):
    with pytest.raises(MMJaxError) as error:
        JsonSource(write(tmp_path / "a.json", text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name, raw, says",
    [
        (
            "a.yaml",
            b"- question: q\n  answer: a\n",
            r"a.yaml: begins with b'- question: q'",
        ),
        ("a.csv", b"question,answer\nq,a\n", r"one object {...} a line"),
        ("a.jsonl", '{"question": "q"}\n'.encode("utf-16"), r"with b'\\xff\\xfe{.*in UTF-8"),
        ("a.json.gz", b"\x1f\x8b\x08\x08\n\x03", "not compressed"),
        (
            "a.jsonl",
            b'[{"question": "q"},\n{"question": "p"}]',
            "holds a JSON array; name it .json",
        ),
        ("a", None, "a: is a folder; name the file in it"),
    ],
)
def test_files_of_another_format_are_refused_when_opened(tmp_path, name, raw, says):
    if raw is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(MMJaxError, match=says):
        JsonSource(tmp_path / name)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_record(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"question": "a"}\r\n\r\n{"question": "b"}\r\n')
    assert [r.messages[0].text for r in map(JsonSource(lines).__getitem__, range(2))] == ["a", "b"]
    assert len(JsonSource(lines)) == 2


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path):
    """Its records were called broken, one by one, until the run ended."""
    path = write(tmp_path / "a.jsonl", '{"question": "a"}\n{"question": "b"}\n{\n')
    source = pickle.loads(pickle.dumps(JsonSource(path)))  # a worker opens it later
    with pytest.raises(BadSample) as error:
        source[2]
    assert "has changed" not in str(error.value)
    write(tmp_path / "b.jsonl", '{"question": "longer"}\n').replace(path)
    worker = pickle.loads(pickle.dumps(source))
    with pytest.raises(BadSample, match=r"a.jsonl:1: not JSON .*; the file has changed since it"):
        worker[0]
    assert source[1].messages[0].text == "b"  # what is open stays the old one
    path.unlink()
    assert source[0].messages[0].text == "a"
    with pytest.raises(MMJaxError, match="a.jsonl: cannot be opened any more: No such file") as e:
        pickle.loads(pickle.dumps(source))[0]
    assert not isinstance(e.value, BadSample)  # or the rest of a mixture would be trained on alone
    os.close(source._file._fd)
    source._file._fd = os.open(tmp_path, os.O_RDONLY)  # a disk that fails: a folder cannot be read
    with pytest.raises(BadSample, match="a.jsonl:1: cannot be read: Is a directory; its disk or"):
        source[0]


def test_missing_file(tmp_path, monkeypatch):
    with pytest.raises(MMJaxError, match="none.json: no such file; check the path"):
        JsonSource(tmp_path / "none.json")
    monkeypatch.chdir(tmp_path)  # a recipe's relative path is one of the working directory
    with pytest.raises(MMJaxError) as error:
        JsonSource("data/none.json")
    assert f"data/none.json: no such file (looked for from {tmp_path}); check" in str(error.value)


def test_an_index_that_finds_no_room_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '{"question": "a"}\n')

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index_cache.np, "savez", full)
    assert len(JsonSource(path, index_dir=tmp_path / "index")) == 1
    assert list((tmp_path / "index").iterdir()) == []


def test_easy_vqa_as_published():
    train, test = EasyVQASource("train"), EasyVQASource("test")
    assert (len(train), len(test)) == (38_575, 9_673)
    seen = [test[i] for i in range(len(test))]
    assert {r.meta["answers"][0] for r in seen} == set(ANSWERS) and len(ANSWERS) == 13
    assert {r.meta["group"] for r in seen} == {"yes/no", "color", "shape"}
    assert all(r.messages[1].text == r.meta["answers"][0] for r in seen)
    assert (
        os.path.exists(train[38_574].images[0]) and os.sep + "train" + os.sep in train[0].images[0]
    )
    assert len(pickle.dumps(train)) < 300
    with pytest.raises(MMJaxError, match="no split 'val'"):
        EasyVQASource("val")


def test_sources_that_outlive_a_program_say_nothing_at_its_end(tmp_path):
    """JAX, once it has devices, leaves the program's own objects to the very end."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    (tmp_path / "b.json").write_text(
        json.dumps({"data": {"B": {"instruction": "q", "answer": "a"}}})
    )
    code = (
        "import jax\n"
        "from mmjax.data.sources import JsonSource\n"
        "from mmjax.data.mimicit import MimicitSource\n"
        "kept = [JsonSource('a.jsonl'), MimicitSource('b.json', group='TEXT_ONLY')]\n"
        "print([len(one[0].messages) for one in kept], len(jax.devices()) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[2, 2] True\n"), done.stderr
    assert "Exception ignored" not in done.stderr
