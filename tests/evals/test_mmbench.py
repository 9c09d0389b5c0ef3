"""MMBench from its TSV to circular evaluation, categories and the file for the server."""

import base64
import csv
import io
import xml.etree.ElementTree as ET
import zipfile

import pytest
from PIL import Image

from mmjax.data.benchmarks.mmbench import MmbenchSource
from mmjax.evals import predictions, runner
from mmjax.evals.tasks import make_task, question_of
from mmjax.types import MMJaxError


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (5, 5), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image",
           "l2-category"]  # fmt: skip
TWO = [7, 'What is it, "this"\nor that?', "nan", "cat", "dog", "", "", "B", "ocr", None, "fine"]
FOUR = [9, "Which?", "Look.", "a", "b", "A", "d", "C", "scene", None, "coarse"]


def write(path, rows, drop=()):
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, [c for c in COLUMNS if c not in drop], delimiter="\t",
                             extrasaction="ignore")  # fmt: skip
        out.writeheader()
        for row in rows:
            found = dict(zip(COLUMNS, row, strict=True))
            found["image"] = picture() if found["image"] is None else found["image"]
            out.writerow(found)
    return str(path)


def test_rotations_are_made_where_the_file_has_none(tmp_path):
    source = MmbenchSource(write(tmp_path / "a.tsv", [TWO, FOUR]))
    assert source.units == [(0, 1), (2, 3, 4, 5)]
    asked = [question_of(source[i]) for i in range(6)]
    assert asked[0] == 'What is it, "this"\nor that?\nA. cat\nB. dog'
    assert asked[1] == 'What is it, "this"\nor that?\nA. dog\nB. cat'
    assert asked[3] == "Look.\nWhich?\nA. b\nB. A\nC. d\nD. a"
    # The option A is the right one, wherever it stands; in brackets it is no option's text.
    answers = [source[i].meta["answers"][0] for i in range(6)]
    assert answers == ["B", "A", "C", "B", "(A)", "D"]
    assert [source[i].meta["id"] for i in (0, 1, 5)] == ["7", "1000007", "3000009"]
    otter = MmbenchSource(write(tmp_path / "a.tsv", [TWO, FOUR]), layout="otter")
    assert question_of(otter[2]).startswith("Look. Which? There are several options:\nA. a\nB. b")


def test_circular_and_plain_accuracy_by_category(tmp_path):
    path = write(tmp_path / "a.tsv", [TWO, FOUR])
    task = make_task({"benchmark": "mmbench", "path": path})
    asked = []

    def say(records, *_):
        """Always B of two, and of four all right but the last rotation."""
        asked.extend(question_of(r) for r in records)
        return [
            "B" if r.meta["unit"] == "7" else "?" if r.meta["id"] == "3000009"
            else r.meta["answers"][0].strip("()") for r in records
        ]  # fmt: skip

    whole = runner.evaluate([task], say, progress=False)["mmbench"]["test"]
    assert asked[0].endswith("given choices directly.")
    assert (whole["n"], whole["correct"]) == (6, 4)
    values = {k: m["value"] for k, m in whole["metrics"].items()}
    assert values == {"circular": 0.0, "plain": 1.0}
    assert list(whole["groups"]) == ["coarse", "fine"]
    once = make_task({"benchmark": "mmbench", "path": path, "circular": False, "group": "category"})
    say_b = lambda records, *_: ["B"] * len(records)  # noqa: E731
    whole = runner.evaluate([once], say_b, progress=False)["mmbench"]["test"]
    assert whole["metrics"] == {"plain": {"value": 0.5, "of": 1}}
    assert whole["groups"]["ocr"]["metrics"]["plain"]["value"] == 1.0


def test_the_files_own_rotations_and_shared_pictures(tmp_path):
    other = [1_000_007, TWO[1], "", "dog", "cat", "", "", "A", "ocr", "7", "fine"]
    path = write(tmp_path / "a.tsv", [other, TWO])
    source = MmbenchSource(path)
    assert source.units == [(0, 1)] and source[1].meta["id"] == "1000007"
    assert source[0].images == source[1].images and source[0].images[0][:4] == b"\x89PNG"
    right = lambda records, *_: [r.meta["answers"][0] for r in records]  # noqa: E731
    task = make_task({"benchmark": "mmbench", "path": path})
    whole = runner.evaluate([task], right, progress=False)["mmbench"]["test"]
    assert whole["metrics"]["circular"] == {"value": 1.0, "of": 1}


def test_a_test_split_gives_a_file_for_the_server_and_no_score(tmp_path):
    path = write(tmp_path / "a.tsv", [TWO, FOUR], drop=("answer",))
    task = make_task({"benchmark": "mmbench", "path": path})  # no rotations but the file's
    say = lambda records, *_: ["B. <dog> & co\x00\ufffe"] * len(records)  # noqa: E731
    found = runner.evaluate([task], say, workdir=tmp_path / "run", progress=False)
    assert found == {} and not (tmp_path / "run/results.json").exists()
    rows = predictions.read_predictions(tmp_path / "run/predictions/mmbench.jsonl")
    assert [(r["unscored"], r.get("error"), r["read"]) for r in rows] == 2 * [(True, None, "B")]
    file = zipfile.ZipFile(tmp_path / "run/predictions/mmbench.test.xlsx")
    sheet = ET.fromstring(file.read("xl/worksheets/sheet1.xml"))
    table = [
        ["".join(cell.itertext()) for cell in row]
        for row in sheet.iter("{http://schemas.openxmlformats.org/spreadsheetml/2006/main}row")
    ]
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert table[1][0] == "7" and table[1][2:] == ["cat", "dog", "", "", "B. <dog> & co"]
    assert table[2][2:] == ["a", "b", "A", "d", "B. <dog> & co"]


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"index\tquestion\n1\t\xff\n")
    with pytest.raises(MMJaxError, match=r"a.tsv: is no TSV in UTF-8 .*invalid start byte.*; give"):
        MmbenchSource(path)

    def refused(*rows, **options):
        write(path, rows, **options)
        with pytest.raises(MMJaxError) as error:
            MmbenchSource(path)
        return str(error.value)

    assert f"{path}:1: has no column image" in refused(TWO, drop=("image",))
    lone = [1_000_009, *FOUR[1:]]
    assert f"{path}:3: question 9 has 4 options and 2 rotation(s)" in refused(FOUR, lone)
    assert "index 1000009 is a rotation of 9, which the file does not hold" in refused(lone)
    hole = [*FOUR[:5], "", *FOUR[6:]]
    assert f"{path}:2: option C of question 9 is missing" in refused(hole)
    wrong = [*TWO[:7], "C", *TWO[8:]]
    assert "the answer of question 7 is 'C', none of its options A, B" in refused(wrong)
    nowhere = [*TWO[:9], "8", *TWO[10:]]
    assert "the picture of question 7 is '8', neither base64 nor" in refused(nowhere)
    short = [TWO[0], "Q", *TWO[2:]]
    assert f"{path}:4: index 9 stands at {path}:3 already" in refused(short, FOUR, FOUR)
