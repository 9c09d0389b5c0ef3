"""Captions in Karpathy's splits, and CIDEr by the package that published numbers come from."""

import contextlib
import importlib.util
import json
import shutil
import sys

import pytest
from PIL import Image

from mmjax.data.benchmarks.captions import KarpathySource
from mmjax.evals import cider, runner, scorers
from mmjax.evals.tasks import make_task
from mmjax.train.settings import EvalSettings, RunSettings
from mmjax.train.tasks import check_tasks
from mmjax.types import MMJaxError


def picture(split, name, *captions, **more):
    return {"split": split, "filename": name, "sentences": [{"raw": c} for c in captions], **more}


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "val2014").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / "val2014" / name)
    images = [
        picture("test", "a.jpg", "A cat.", "One cat\n", filepath="val2014"),
        picture("restval", "b.jpg", "A dog.", filepath="val2014"),
        picture("test", "c.jpg", "A man rides.", filepath="val2014"),
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}))
    return {"path": str(path), "images": str(tmp_path)}


def test_splits_and_pictures_with_and_without_a_folder(coco, tmp_path):
    test, train = KarpathySource(**coco), KarpathySource(**coco, split="train")
    assert [r.meta["answers"] for r in test] == [["A cat.", "One cat"], ["A man rides."]]
    assert [r.images for r in train] == [(f"{tmp_path}/val2014/b.jpg",)]
    flat = KarpathySource(coco["path"], f"{tmp_path}/val2014")
    assert flat[0].images == (f"{tmp_path}/val2014/a.jpg",)
    with pytest.raises(MMJaxError, match="has no split 'dev'; it has test, restval"):
        KarpathySource(**coco, split="dev")
    (tmp_path / "val2014/c.jpg").unlink()
    with pytest.raises(MMJaxError, match="picture 2: the picture 'val2014/c.jpg' is not in"):
        KarpathySource(**coco)


def test_cider_is_asked_of_the_package(coco, tmp_path, monkeypatch):
    """The package runs a Java program: one that counts words in common stands for it."""
    # The tokenizer reads a file of lines in UTF-8: another line end would shift all that follow.
    for folder, text in (
        ("tokenizer/ptbtokenizer.py", "class PTBTokenizer:\n    def tokenize(self, captions):\n"
         "        lines = {k: [c['caption'].encode() for c in v] for k, v in captions.items()}\n"
         "        assert all(len(c.decode().splitlines()) < 2 for v in lines.values() for c in v)\n"
         "        return {k: [c.decode().lower() for c in v] for k, v in lines.items()}\n"),
        ("cider/cider.py", "class Cider:\n    def compute_score(self, right, said):\n"
         "        each = [float(said[k][0] in right[k]) for k in right]\n"
         "        return sum(each) / len(each), each\n"),
    ):  # fmt: skip
        file = tmp_path / "pycocoevalcap" / folder
        file.parent.mkdir(parents=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    say = lambda records, *_: ["ONE\u2028CAT", "a\r\nman \ud800"]  # noqa: E731
    task = make_task(coco | {"benchmark": "coco_captions"})
    whole = runner.evaluate([task], say, progress=False)["coco_captions"]["test"]
    assert whole["metrics"] == {"CIDEr": {"value": 50.0}}
    lost = {"prediction": "", "score": 0.0}  # its record could not be read
    right = {"prediction": "a cat", "answer": "a cat"}
    assert cider.cider([right, lost]) == {"CIDEr": {"value": 50.0}}
    assert cider.cider([lost]) == {"CIDEr": {"value": 0.0}}
    assert whole["accuracy"] == 0.833333  # 1, and 2 * 1 of the words "man" and "man rides"


def test_what_cider_needs_is_told_before_a_model_is_loaded(coco, monkeypatch):
    asked = EvalSettings(tasks=(coco | {"benchmark": "coco_captions"},))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MMJaxError, match=r"pip install 'mmjax\[captions\]'"):
        check_tasks(RunSettings(eval=asked))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MMJaxError, match="CIDEr needs Java: .* default-jre-headless"):
        cider.check()


@pytest.mark.parametrize(
    ("does", "told"),
    [("raise PermissionError(13, 'Permission denied', '/usr')", "its own folder.*Permission.*/usr"),
     ("return {}", "made None of 'A cat.'"), ("return {0: ['a cat']}", None)],
)  # fmt: skip
def test_a_tokenizer_that_cannot_run_is_told_before_a_model_is_loaded(
    does, told, tmp_path, monkeypatch
):
    file = tmp_path / "pycocoevalcap/tokenizer/ptbtokenizer.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"class PTBTokenizer:\n    def tokenize(self, captions):\n        {does}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(MMJaxError, match=told) if told else contextlib.nullcontext():
        cider.check()


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [("a red cat", ["the red cat"], 1.0), ("red red cat", ["red dog", "blue"], 0.4),
     ("", ["cat"], 0.0), ("man", ["man rides", "x"], 2 / 3)],
)  # fmt: skip
def test_word_f1_by_hand(said, right, score):
    assert scorers.word_f1(said, right) == pytest.approx(score)
