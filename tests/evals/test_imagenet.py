"""ImageNet from its publisher's files to top-1 and top-5."""

import json
import string

import pytest
from PIL import Image

from mmjax.data.benchmarks.imagenet import ImageNetSource
from mmjax.data.templates import get_template
from mmjax.evals import predictions, runner, summaries
from mmjax.evals.few_shot import demonstrations
from mmjax.evals.tasks import ask, make_task
from mmjax.types import MMJaxError

MAPPING = """n01440764 tench, Tinca tinca
n02012849 crane
n02086240 Shih-Tzu
n03126707 crane
n03445777 golf ball
"""
FILES = {"n01440764": ["ILSVRC2012_val_00000293.JPEG"],
         "n02012849": ["ILSVRC2012_val_00000377.JPEG"],
         "n02086240": ["ILSVRC2012_val_00000068.JPEG", "ILSVRC2012_val_00000001.JPEG"]}  # fmt: skip


def save(folder, files=FILES, mapping=MAPPING, name="LOC_synset_mapping.txt"):
    for label, pictures in files.items():
        (folder / "val" / label).mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            Image.new("RGB", (6, 4)).save(folder / "val" / label / picture, "JPEG")
    (folder / name).write_text(mapping, "utf-8")
    return {"images": str(folder / "val"), "names": str(folder / name)}


class Ranks:
    """Says how likely each option is, by the class of what is asked."""

    def __init__(self, says):
        self.says, self.options = says, None

    def rank(self, records, options, resolution, *, mean):
        assert mean
        self.options = options
        return [self.says[r.meta["class"]] for r in records]


def test_pictures_of_folders_are_asked_for_the_publishers_names(tmp_path):
    source = ImageNetSource(**save(tmp_path))
    assert [(r.meta["id"], r.meta["answers"]) for r in source] == [
        ("n01440764/ILSVRC2012_val_00000293.JPEG", ["tench"]),
        ("n02012849/ILSVRC2012_val_00000377.JPEG", ["crane"]),
        ("n02086240/ILSVRC2012_val_00000001.JPEG", ["Shih-Tzu"]),
        ("n02086240/ILSVRC2012_val_00000068.JPEG", ["Shih-Tzu"]),
    ]
    assert source[3].meta["choices"] == ("tench", "crane", "Shih-Tzu", "golf ball")
    assert source[3].images == (str(tmp_path / "val/n02086240/ILSVRC2012_val_00000068.JPEG"),)


def test_pictures_as_the_challenge_has_them(tmp_path):
    files = save(tmp_path)
    (tmp_path / "flat").mkdir()
    for label in FILES:
        for picture in FILES[label]:
            (tmp_path / "val" / label / picture).rename(tmp_path / "flat" / picture)
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000068,n02086240 85 1 499 272 n02086240 1 2 3 4 \n"
        "ILSVRC2012_val_00000293,n01440764 1 1 9 9 \n"
    )
    flat = files | {"images": str(tmp_path / "flat"), "labels": str(table)}
    source = ImageNetSource(**flat)
    assert [(r.meta["id"], r.meta["class"]) for r in source] == [
        ("ILSVRC2012_val_00000068.JPEG", "n02086240"),
        ("ILSVRC2012_val_00000293.JPEG", "n01440764"),
    ]
    (tmp_path / "flat/ILSVRC2012_val_00000293.JPEG").unlink()
    with pytest.raises(MMJaxError, match=r"solution.csv:3: the picture 'ILSVRC2012_val_00000293"):
        ImageNetSource(**flat)
    table.write_text("id,class\na,b\n")
    with pytest.raises(MMJaxError, match=r"solution.csv:2: lacks ImageId or PredictionString"):
        ImageNetSource(**flat)


@pytest.mark.parametrize(
    "given",
    [
        ["tench", "crane bird", "Shih Tzu"],  # in the order of the ids, as OpenAI's
        {"0": ["n01440764", "tench"], "1": ["n02012849", "crane_bird"],
         "2": ["n02086240", "Shih_Tzu"]},
        {"n02086240": "Shih Tzu", "n01440764": "tench", "n02012849": "crane bird"},
    ],
)  # fmt: skip
def test_names_of_other_files(tmp_path, given):
    source = ImageNetSource(**save(tmp_path, mapping=json.dumps(given), name="names.json"))
    said = [r.meta["answers"][0] for r in source]
    assert said == ["tench", "crane bird", "Shih Tzu", "Shih Tzu"]


def test_files_that_do_not_fit(tmp_path):
    files = save(tmp_path)
    names = save(tmp_path, mapping=json.dumps(["tench", "crane"]), name="names.json")
    with pytest.raises(MMJaxError, match="a list of 2 names, and there are pictures of 3 classes"):
        ImageNetSource(**names)
    names = save(tmp_path, mapping=MAPPING.split("n02086240")[0])
    with pytest.raises(MMJaxError, match=r"no name for the class 'n02086240' \(1 of 3"):
        ImageNetSource(**names)
    names = save(tmp_path, mapping="n01440764\n")
    with pytest.raises(MMJaxError, match=r"mapping.txt:1: the name is ''"):
        ImageNetSource(**names)
    with pytest.raises(MMJaxError, match="holds no folders of classes"):
        ImageNetSource(str(tmp_path / "val/n01440764"), files["names"])
    (tmp_path / "val/n09999999").mkdir()
    with pytest.raises(MMJaxError, match="n09999999: no pictures in this class"):
        ImageNetSource(**files)


def test_from_the_files_to_top_1_and_top_5(tmp_path):
    task = make_task({"benchmark": "imagenet", **save(tmp_path)})
    says = Ranks({"n01440764": [-1.0, -2.0, -3.0, -4.0], "n02012849": [-3.0, -2.0, -1.0, -4.0],
                  "n02086240": [-3.0, -3.0, -1.0, -4.0]})  # fmt: skip
    found = runner.evaluate([task], says, workdir=tmp_path / "run", progress=False)
    entry = found["imagenet"]["test"]
    assert (entry["correct"], entry["n"], entry["chance"]) == (3, 4, 0.25)
    assert entry["metrics"] == {"top-5": {"value": 1.0, "of": 1}}
    assert says.options[0] == ["tench", "crane", "Shih-Tzu", "golf ball"]


def test_of_many_classes_the_likeliest_are_kept(tmp_path):
    names = {f"n{i:08}": f"thing {letter}" for i, letter in enumerate(string.ascii_letters)}
    files = {"n00000000": ["a.JPEG"], "n00000030": ["b.JPEG"]}
    files = save(tmp_path, files, "".join(f"{k} {v}\n" for k, v in names.items()))
    likely = [-float(abs(i - 32)) for i in range(52)]  # 32, 31, 33, 30, 34
    says = Ranks({"n00000000": likely, "n00000030": likely})
    task = make_task({"benchmark": "imagenet", **files})
    found = runner.evaluate([task], says, workdir=tmp_path / "run", progress=False)
    assert found["imagenet"]["test"]["metrics"]["top-5"]["value"] == 0.5
    rows = predictions.read_predictions(predictions.predictions_path(tmp_path / "run", task.name))
    assert rows[0]["options"] == [f"thing {x}" for x in "GFHEI"] and "choices" not in rows[0]
    assert rows[0]["likelihoods"] == [0.0, -1.0, -1.0, -2.0, -2.0]
    assert [row["prediction"] for row in rows] == ["thing G", "thing G"]


def test_it_is_asked_as_openflamingo_asks(tmp_path):
    files = save(tmp_path)
    task = make_task({"benchmark": "imagenet", **files, "shots": 1, "limit": 1,
                      "demos": {"kind": "imagenet", **files}})  # fmt: skip
    source = ImageNetSource(**files)
    asked = demonstrations(task).before(ask(task, source[0]), 0)
    said = "".join(
        "<image>" if s.kind == "image" else f"<{s.value}>" if s.kind == "special" else s.value
        for s in get_template("open_flamingo_class_prompt")(asked)
    )
    assert said in [f"<bos><image>Output:{x}<eoc><image>Output:" for x in ("crane", "Shih-Tzu")]


def test_what_could_not_be_asked_is_not_among_the_first_five():
    row = {"answer": "b", "choices": ["a", "b"], "likelihoods": [-1.0, -2.0]}
    assert summaries.top_5([row, {"answer": "b", "error": "lost"}])["top-5"]["value"] == 0.5
    with pytest.raises(MMJaxError, match="summary 'top_5' is of the texts of ranked options"):
        make_task({"name": "t", "source": [], "summary": "top_5", "scorer": "multiple_choice",
                   "rank": "likelihood"})  # fmt: skip
