"""MM-Vet from its publishers' folder to the file that their evaluator takes."""

import json

import pytest
from PIL import Image

from mmjax.data.benchmarks.mmvet import MmVetSource
from mmjax.evals import runner
from mmjax.evals.tasks import make_task
from mmjax.types import MMJaxError


def test_mmvet_is_asked_and_written_for_its_evaluator(tmp_path):
    folder = tmp_path / "mm-vet"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(folder / "images/v1_0.png")
    one = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5",
           "imagesource": "https://example.org", "capability": ["ocr", "math"]}  # fmt: skip
    (folder / "mm-vet.json").write_text(json.dumps({"v1_0": one, "v1_10": one}))
    asked = []

    def say(records, *_):
        asked.extend(r.messages[0].text for r in records)
        return ["x is -1 or -5.", "no idea"]

    task = make_task({"benchmark": "mmvet", "path": str(folder)})
    assert runner.evaluate([task], say, workdir=tmp_path / "run", progress=False) == {}
    assert asked == ["What is x?"] * 2
    sent = json.loads((tmp_path / "run/predictions/mmvet.test.json").read_text())
    assert sent == {"v1_0": "x is -1 or -5.", "v1_10": "no idea"}
    assert MmVetSource(folder)[0].meta["group"] == "ocr, math"
    (folder / "images/v1_0.png").unlink()
    with pytest.raises(MMJaxError, match="question v1_0: the picture 'v1_0.png' is not in"):
        MmVetSource(folder)
    (folder / "mm-vet.json").write_text('{"v1_0": {"imagename": "v1_0.png"}}')
    with pytest.raises(MMJaxError, match="question v1_0: has no field 'question'"):
        MmVetSource(folder)
    (folder / "mm-vet.json").write_text("[]")
    with pytest.raises(MMJaxError, match="holds no object of questions by their ids"):
        MmVetSource(folder)
