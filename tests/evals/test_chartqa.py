"""ChartQA from its publishers' folder and from the hub, to relaxed accuracy."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmjax.data.benchmarks.chartqa import ChartQaSource
from mmjax.evals import runner, scorers
from mmjax.evals.tasks import make_task
from mmjax.types import MMJaxError


@pytest.fixture
def split(tmp_path):
    folder = tmp_path / "ChartQA Dataset/test"
    (folder / "png").mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(folder / "png/1.png")
    human = [{"imgname": "1.png", "query": "How many?", "label": "100"}]
    machine = [{"imgname": "1.png", "query": "Which year?", "label": "2010"},
               {"imgname": "1.png", "query": "Who?", "label": "Norway"}]  # fmt: skip
    (folder / "test_human.json").write_text(json.dumps(human))
    (folder / "test_augmented.json").write_text(json.dumps(machine))
    return folder


def test_both_parts(split):
    said = {"How many?": "95", "Which year?": "1800", "Who?": "norway"}

    def say(records, *_):
        asked = [r.messages[0].text.split("\n") for r in records]
        assert {a[1] for a in asked} == {"Answer the question using a single word or phrase."}
        return [said[a[0]] for a in asked]

    task = make_task({"benchmark": "chartqa", "path": str(split)})
    whole = runner.evaluate([task], say, progress=False)["chartqa"]["test"]
    assert (whole["n"], whole["correct"]) == (3, 2)
    assert {k: g["accuracy"] for k, g in whole["groups"].items()} == {"augmented": 0.5, "human": 1}
    (split / "png/1.png").unlink()
    with pytest.raises(MMJaxError, match="test_augmented.json:1: the picture '1.png' is not in"):
        ChartQaSource(split)


def test_the_hubs_files(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "PNG")
    row = {"question": "How many?", "answer": "3", "image": {"bytes": buffer.getvalue()}}
    rows = [row | {"type": "human_test"}, row | {"type": "augmented_test"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    one, other = ChartQaSource(tmp_path)
    assert one.images == (buffer.getvalue(),) and one.meta["answers"] == ["3"]
    assert (one.meta["group"], other.meta["group"]) == ("human", "augmented")
    pq.write_table(pa.Table.from_pylist([row | {"type": "train"}]), tmp_path / "test.parquet")
    with pytest.raises(MMJaxError, match=":0: 'train' names neither human nor augmented"):
        ChartQaSource(tmp_path)


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("-100", "100", 0),
     ("-98", "-100", 1), (" Yes\n", "yes", 1),
     ("13.395", "14.1", 0),  # 0.05 * 14.1 is rounded up, 0.705 / 14.1 too: they divide
     ("0.12", "12%", 1), ("12", "12%", 0), ("1,200", "1200", 0), ("12 km", "12", 0),
     ("Yes", "yes", 1), ("yes.", "yes", 0), ("0", "0", 1), ("0.0", "0", 0), ("x", "3", 0)],
)  # fmt: skip
def test_relaxed_accuracy_by_hand(said, right, score):
    """After relaxed_correctness of Pix2Struct, Qwen-VL and lmms-eval."""
    assert scorers.get_scorer("relaxed_accuracy")(said, [right]) == score
