"""TFDS documents and pairs: records, batches and skips are those of shards of the same data."""

import base64
import dataclasses
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_check import printed
from test_check_shards import MODEL, settings
from test_mmc4 import write
from test_pipeline import assert_equal
from test_tfds_source import write_tfds
from test_webdataset import pairs, picture, write_tar

from mmjax.config import resolve_recipe
from mmjax.data import check as command
from mmjax.data.catalog import make_source, make_sources
from mmjax.data.mmc4 import Mmc4Source
from mmjax.data.tfds_pretraining import TfdsInterleaved, TfdsPairs
from mmjax.data.webdataset import LaionSource
from mmjax.schema import to_dataclass
from mmjax.train.build import blueprint, train_iterator
from mmjax.train.settings import LoRASettings, RunSettings
from mmjax.types import BadSample, MMJaxError

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_flamingo_document_goldens import document, documents

ROOT = Path(__file__).parents[2]
F = tfds.features
INFO = {"image": F.Image(), "matched_text_index": np.int64, "matched_sim": np.float32}
FEATURES = F.FeaturesDict(
    {
        "id": F.Text(),
        "text_list": F.Sequence(F.Text()),
        "image_info": F.Sequence(INFO),
        "similarity_matrix": F.Tensor(shape=(None, None), dtype=np.float64, encoding="zlib"),
        "flat": F.Sequence(np.float32),
        "rows": F.Sequence(F.Sequence(np.float32)),
    }
)


def example(name, info):
    """Lay out a document of MMC4 in these features; an absent picture is empty."""
    matrix = np.array(info["similarity_matrix"], np.float64).reshape(-1, len(info["text_list"]))
    listed = [
        {
            "image": base64.b64decode(one.get("image_base64", "")),
            "matched_text_index": one.get("matched_text_index", 0),
            "matched_sim": one.get("matched_sim", 0.0),
        }
        for one in info["image_info"]
    ]
    return {
        "id": name,
        "text_list": info["text_list"],
        "image_info": listed,
        "similarity_matrix": matrix,
        "flat": matrix.ravel().astype(np.float32),
        "rows": matrix.tolist(),
    }


def all_documents():
    """The documents of the shards' tests but for ChatGPT's sequences, each with its own pairs."""
    found = {n.replace(" ", "-"): d for n, d in documents().items() if "chat" not in n}
    for info in found.values():
        for one, row in zip(info["image_info"], info["similarity_matrix"], strict=True):
            best = int(np.argmax(row))
            one |= {"matched_text_index": best, "matched_sim": row[best]}
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same documents as a shard and as a TFDS folder."""
    folder, infos = tmp_path_factory.mktemp("documents"), all_documents()
    shard = write(folder / "a.tar", infos)
    examples = [example(f"a.tar/{name}", info) for name, info in infos.items()]
    with pytest.MonkeyPatch.context() as patch:
        # TFDS asks TensorFlow what float32 is called when it writes a sequence of sequences.
        patch.setattr(F.TensorInfo, "dtype", property(lambda info: info.np_dtype))
        return shard, write_tfds(folder / "tiny/1.0.0", FEATURES, examples)


@pytest.fixture(scope="module")
def both_pairs(tmp_path_factory):
    """The same pairs as a shard and as a TFDS folder; one without picture, one without caption."""
    folder = tmp_path_factory.mktemp("pairs")
    members = dict(pairs(0, 6)) | {"8.jpg": b"", "8.txt": b"x", "9.jpg": picture(9), "9.txt": b" "}
    shard = write_tar(folder / "000.tar", members.items())
    names = [name.removesuffix(".txt") for name in members if name.endswith(".txt")]
    examples = [
        {"key": f"000.tar/{n}", "jpg": members[f"{n}.jpg"], "captions": [members[f"{n}.txt"], "z"]}
        for n in names
    ]
    features = {"key": F.Text(), "jpg": F.Image(), "captions": F.Sequence({"text": F.Text()})}
    for one in examples:
        one["captions"] = [{"text": text} for text in one["captions"]]
    return shard, write_tfds(folder / "tfds", F.FeaturesDict(features), examples)


PAIR_FIELDS = {"id": "key", "image": "jpg", "caption": "captions.text.0"}


def outcomes(source):
    """What each index gives: its record, without the file it came from, or a reason."""
    found = []
    for i in range(len(source)):
        try:
            record = source[i]
            meta = {k: v for k, v in record.meta.items() if k not in ("source", "line")}
            found.append((record.messages, record.images, meta))
        except BadSample as error:
            found.append(error.reason)
    return found


@pytest.mark.parametrize(
    "options, fields",
    [
        ({}, {}),
        ({}, {"similarity_matrix": "flat"}),
        ({}, {"similarity_matrix": "rows"}),
        (dict(assignment="one_to_one", min_kilobytes=None, seed=1), {}),
        (dict(assignment="matched", max_images=3, legacy_openflamingo=True), {}),
    ],
)
def test_records_are_those_of_the_shard(both, options, fields):
    shard, folder = both
    wanted = outcomes(Mmc4Source(shard, **options))
    source = TfdsInterleaved(folder, "train", fields, **options)
    assert outcomes(pickle.loads(pickle.dumps(source))) == wanted
    assert {"too_few_images", "single_image"} <= {w for w in wanted if isinstance(w, str)}
    assert sum(not isinstance(w, str) for w in wanted) > 30
    record = source[0]
    assert record.meta == {"id": "a.tar/in-order", "source": folder, "line": 0}


def test_without_a_number_a_picture_stands_where_it_is_said_to(tmp_path):
    features = F.FeaturesDict(
        {
            "texts": F.Sequence(F.Text()),
            "pictures": F.Sequence(F.Text()),
            "at": F.Sequence(np.int64),
        }
    )
    held = document(["Aa.", "Bb."], [[0, 0]] * 3)["image_info"]
    held = [one["image_base64"] for one in held[:2]] + [""]
    good = {"texts": ["Aa.", "Bb."], "pictures": held, "at": [1, 0, 0]}
    short, far = good | {"at": [1]}, good | {"at": [1, 2, 0]}
    folder = write_tfds(tmp_path, features, [good, short, far])
    fields = {"text_list": "texts", "image_base64": "pictures", "matched_text_index": "at"}
    source = TfdsInterleaved(folder, "train", fields, assignment="matched")
    record = source[0]
    assert record.messages[0].text == "<image>Aa. <image>Bb."
    assert record.images == tuple(base64.b64decode(one) for one in held[1::-1])
    assert record.meta["id"] == "train/0"
    with pytest.raises(BadSample, match=r"\[train\]:1 .*1 'matched_text_index' for 3 picture"):
        source[1]
    with pytest.raises(BadSample, match="picture 1: 'matched_text_index' 2 and .* none of 2"):
        source[2]


def test_pairs_are_those_of_the_shard(both_pairs):
    shard, folder = both_pairs
    found = outcomes(TfdsPairs(folder, "train", PAIR_FIELDS))
    wanted = outcomes(LaionSource(shard))
    # A shard holds no picture in another way: its sample lacks the file.
    assert found[6] == "missing_image" and wanted[6][1] == (b"",)
    assert found[:6] == wanted[:6] and found[7] == wanted[7]
    half = TfdsPairs(folder, "train[:50%]", PAIR_FIELDS)
    assert outcomes(half) == wanted[:4]
    with pytest.raises(IndexError):
        half[4]


def mixture(laion, mmc4):
    options = dict(single_image_share=0.9)
    return settings(
        {"laion": laion, "mmc4": mmc4 | options},
        {"laion": "laion_caption", "mmc4": "interleaved"},
        **dict(seq_len=64, max_targets=64, max_bad_share=0.5, augment={"laion": ("flip",)}),
        loss_weights={"laion": 0.2, "mmc4": 1.0},
        too_long="truncate",
    )


def test_batches_are_those_of_the_shards_and_go_on(both, both_pairs, tmp_path):
    shards = mixture(
        dict(kind="laion", path=str(both_pairs[0])), dict(kind="mmc4", path=str(both[0]))
    )
    files = mixture(
        dict(kind="tfds_pairs", name=both_pairs[1], split="train", fields=PAIR_FIELDS),
        dict(kind="tfds_interleaved", name=both[1], split="train"),
    )
    model = dataclasses.replace(MODEL, words=(*MODEL.words, "Sentence", *map(str, range(9))))
    processor = blueprint(model, LoRASettings(), 0).processor
    runs = [
        train_iterator(run, processor, tmp_path / name)
        for name, run in (("shards", shards), ("tfds", files), ("resumed", files))
    ]
    wanted, found, resumed = runs
    sources: set[int] = set()
    for step in range(8):
        batch = next(found)
        assert_equal(batch, next(wanted))
        sources |= set(batch["target_source"].ravel().tolist())
        if step == 4:
            resumed.set_state(json.loads(json.dumps(found.get_state())))
        elif step > 4:
            assert_equal(next(resumed), batch)
    assert sources == {-1, 0, 1}
    for run in runs:
        run.close()


def test_the_recipe_reads_tfds(both, both_pairs):
    given = {"mmc4.name": both[1], "laion.name": both_pairs[1], "laion.fields.image": "jpg"}
    given["laion.fields.caption"] = "captions.text.0"
    overrides = [f"data.sources.{name}={value}" for name, value in given.items()]
    recipe = resolve_recipe(f"{ROOT}/configs/openflamingo_3b.py:tfds", overrides)
    data = to_dataclass(RunSettings, recipe).data
    sources = make_sources(data.sources)
    assert outcomes(sources["mmc4"]) == outcomes(Mmc4Source(both[0]))
    assert sources["laion"][2].messages == LaionSource(both_pairs[0])[2].messages
    assert data.loss_weights == {"laion": 0.2, "mmc4": 1.0}


def test_the_check_counts_what_it_counts_of_the_shard(both):
    tables = []
    for spec in (
        dict(kind="mmc4", path=str(both[0])),
        dict(kind="tfds_interleaved", name=both[1], split="train"),
    ):
        run = settings({"mmc4": spec}, "interleaved", seq_len=64, max_targets=64)
        (report,) = command.check(run)
        assert report.records == len(all_documents()) == report.draws and not report.repeated
        tables.append((report.counts, report.sizes, report.images, printed([report], run)[0]))
    assert tables[0] == tables[1] and tables[0][0]["too_few_images"] > 0


@pytest.mark.parametrize(
    "kind, options, says",
    [
        ("tfds_pairs", {}, "no feature 'image', the picture; say .*fields={'image': ...}.* no fea"),
        ("tfds_pairs", {"fields": {"picture": "x"}}, "'picture' is none of the parts id, image"),
        (
            "tfds_pairs",
            {"fields": {"image": "image_info.image.0", "caption": "text_list"}},
            "'caption' is the feature 'text_list': is sequence of text, wanted is text. The",
        ),
        (
            "tfds_interleaved",
            {"fields": {"similarity_matrix": "matrix"}},
            "'similarity_matrix' is the feature 'matrix': there is none, wanted is sequence of seq",
        ),
        (
            "tfds_interleaved",
            {"fields": {"matched_text_index": "flat"}, "assignment": "matched"},
            "'matched_text_index' is the feature 'flat': is sequence of number, wanted is sequence "
            "of integer",
        ),
    ],
)
def test_features_that_do_not_fit_are_named_with_those_there_are(both, kind, options, says):
    with pytest.raises(MMJaxError, match=says) as error:
        make_source(dict(kind=kind, name=both[1], split="train", **options))
    assert all(f"{name}: " in str(error.value) for name in ("flat", "id", "image_info.matched_sim"))
    assert "similarity_matrix: sequence of sequence of number" in str(error.value)


def test_what_is_not_there_is_told_when_it_is_opened(both, both_pairs, tmp_path):
    source = dict(kind="tfds_interleaved", split="train")
    with pytest.raises(MMJaxError, match="gone: no such folder; .* of a prepared version"):
        make_source(source | dict(name=str(tmp_path / "gone")))
    with pytest.raises(MMJaxError, match="'gone/1.0.0' .*; nor is there a folder.*split") as error:
        make_source(source | dict(name="gone/1.0.0"))
    assert len(str(error.value)) < 400  # not the names of all datasets
    above = Path(both[1]).parent
    with pytest.raises(MMJaxError, match=f"no dataset_info.json.*there is one in {both[1]}"):
        make_source(source | dict(name=str(above)))
    with pytest.raises(MMJaxError, match="split 'dev' cannot be read"):
        make_source(source | dict(name=both[1], split="dev"))
    with pytest.raises(MMJaxError, match="assignment 'best' is none of argmax"):
        make_source(source | dict(name="gone", assignment="best"))
    with pytest.raises(MMJaxError, match=r"source\.threshold; did you mean 'textsim_threshold'"):
        make_source(source | dict(name="gone", threshold=0.24))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(both_pairs[1]).iterdir():
        if "array_record" not in file.name:
            (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MMJaxError, match=r"array_record.*: no such file \(1 of the 1 files"):
        TfdsPairs(copy, "train", PAIR_FIELDS)
