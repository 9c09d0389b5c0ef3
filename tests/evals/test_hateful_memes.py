"""Hateful Memes from its publisher's files to its number, the area under the ROC curve."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from mmjax.data.benchmarks.hateful_memes import HatefulMemesSource
from mmjax.data.templates import get_template
from mmjax.evals import predictions, runner, summaries
from mmjax.evals.few_shot import demonstrations
from mmjax.evals.tasks import ask, make_task
from mmjax.types import MMJaxError

ROWS = [
    {"id": 8291, "img": "img/08291.png", "label": 1, "text": "white people is this a shooting"},
    {"id": 46971, "img": "img/46971.png", "label": 0, "text": "it's a 'dog'"},
    {"id": 3745, "img": "img/03745.png", "label": 1, "text": "bravery at its finest"},
    {"id": 83745, "img": "img/83745.png", "label": 0, "text": "your order comes to $37.50"},
]


def save(folder, rows, name="dev_seen.jsonl"):
    (folder / "img").mkdir(exist_ok=True)
    for row in rows:
        Image.new("RGB", (6, 4)).save(folder / row["img"])
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {"path": str(folder / name), "images": str(folder)}


class Ranks:
    """Says how likely no and yes are, by the id of what is asked."""

    def __init__(self, **likelihoods):
        self.likelihoods = likelihoods

    def rank(self, records, options, resolution, *, mean):
        assert options == [["no", "yes"]] * len(records) and mean
        return [self.likelihoods[f"m{r.meta['id']}"] for r in records]


def test_from_the_file_to_the_area(tmp_path):
    files = save(tmp_path, ROWS)
    task = make_task({"benchmark": "hateful_memes", **files})
    # Of the four pairs of a hateful one and another, one is the wrong way round and one is a tie.
    says = Ranks(m8291=[-2.0, -1.0], m46971=[-1.0, -1.5], m3745=[-3.0, -3.5], m83745=[-9.0, -8.0])
    found = runner.evaluate([task], says, workdir=tmp_path / "run", progress=False)
    entry = found["hateful_memes"]["test"]
    assert entry["metrics"] == {"ROC AUC": {"value": 0.5, "of": 1}} and entry["correct"] == 2
    rows = predictions.read_predictions(predictions.predictions_path(tmp_path / "run", task.name))
    assert [row["prediction"] for row in rows] == ["yes", "no", "no", "yes"]
    assert rows[1]["options"] == ["no", "yes"] and rows[1]["likelihoods"] == [-1.0, -1.5]


def test_it_is_asked_as_openflamingo_asks(tmp_path):
    task = make_task({"benchmark": "hateful_memes", **save(tmp_path, ROWS), "shots": 1,
                      "demos": {"kind": "hateful_memes", **save(tmp_path, ROWS[:2], "train.jsonl")}
                      })  # fmt: skip
    source = HatefulMemesSource(**save(tmp_path, ROWS))
    asked = demonstrations(task).before(ask(task, source[3]), 3)
    said = "".join(
        "<image>" if s.kind == "image" else f"<{s.value}>" if s.kind == "special" else s.value
        for s in get_template("open_flamingo_class_prompt")(asked)
    )
    shown = [
        f"<image>is an image with: '{row['text']}' written on it. Is it hateful? Answer:{word}<eoc>"
        for row, word in zip(ROWS, ("yes", "no"), strict=False)
    ]
    end = shown[0].replace(ROWS[0]["text"], "your order comes to $37.50").removesuffix("yes<eoc>")
    assert said in [f"<bos>{one}{end}" for one in shown]


def test_a_test_split_is_not_scored_and_bad_labels_are_named(tmp_path):
    bare = [{k: v for k, v in row.items() if k != "label"} for row in ROWS]
    assert HatefulMemesSource(**save(tmp_path, bare))[0].meta["unscored"]
    with pytest.raises(MMJaxError, match=r"dev_seen.jsonl:2: the label is 'no', neither 0 nor 1"):
        HatefulMemesSource(**save(tmp_path, [ROWS[0], ROWS[1] | {"label": "no"}]))
    files = save(tmp_path, ROWS)
    (tmp_path / "img/03745.png").unlink()
    with pytest.raises(MMJaxError, match="the picture 'img/03745.png' is not in"):
        HatefulMemesSource(**files)


def test_the_area_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    for n in (2, 3, 10, 200):
        wanted = np.arange(n) % 3 == 0
        likelihoods = rng.integers(-4, 0, (n, 2)).astype(float)  # many alike
        rows = [
            {"answer": "yes" if w else "no", "options": ["no", "yes"], "likelihoods": x.tolist()}
            for w, x in zip(wanted, likelihoods, strict=True)
        ]
        share = np.exp(likelihoods)[:, 1] / np.exp(likelihoods).sum(1)
        share = share.round(12)  # those of one difference are alike
        found = summaries.roc_auc(rows)["ROC AUC"]["value"]
        assert found == pytest.approx(roc_auc_score(wanted, share), abs=1e-6)


def test_what_could_not_be_asked_is_wrong_and_one_kind_of_answer_has_no_area():
    row = {"answer": "yes", "options": ["no", "yes"], "likelihoods": [-1.0, -2.0]}
    other = row | {"answer": "no", "likelihoods": [-1.0, -3.0]}
    lost = {"answer": "yes", "options": ["no", "yes"], "error": "no such picture"}
    assert summaries.roc_auc([row, other])["ROC AUC"]["value"] == 1
    assert summaries.roc_auc([row, other, lost])["ROC AUC"]["value"] == 0.5
    assert summaries.roc_auc([row, lost]) == {}
    with pytest.raises(MMJaxError, match="summary 'roc_auc' is of the last of a task's options"):
        make_task({"name": "t", "source": [], "summary": "roc_auc"})
