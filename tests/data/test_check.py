"""The pre-flight check: what it counts is what training would drop."""

import collections
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmjax.data import check as command
from mmjax.data.catalog import make_source
from mmjax.data.check import in_steps
from mmjax.data.limits import spread
from mmjax.data.packing import BatchShape
from mmjax.data.survey import SourceReport, fingerprint, require_some_good
from mmjax.parallel import distributed
from mmjax.train.build import blueprint, train_iterator, train_loader
from mmjax.train.settings import DataSettings, LoRASettings, ModelSettings, RunSettings
from mmjax.types import Message, MMJaxError, Record

ROOT = Path(__file__).parents[2]
SIZES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=8
)
MODEL = ModelSettings(config=SIZES, words=("what is it? red", "User: Assistant:"))


def write_rows(folder, bad=True, count=20):
    """Good records of two sizes; one missing and one broken image, an empty and a long answer."""
    folder.mkdir(exist_ok=True)
    for name, size in (("small", (16, 8)), ("large", (24, 24))):
        pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "large.png").read_bytes()[:80])
    sizes = ["small.png"] * (count - 5) + ["large.png"] * 5
    rows = [
        {"id": f"r{i}", "image": image, "question": "what is it?", "answer": "red"}
        for i, image in enumerate(sizes)
    ]
    if bad:
        rows += [rows[0] | {"id": "gone", "image": "gone.png"}]
        rows += [rows[0] | {"id": "broken", "image": "broken.png"}]
        rows += [rows[0] | {"id": "empty", "answer": " "}]
        rows += [rows[0] | {"id": "long", "answer": "red " * 20}]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return {"kind": "json", "path": str(path)}


def settings(sources, **data):
    shape = dict(seq_len=40, max_patches=24, max_targets=8, batch_size=2)
    return RunSettings(model=MODEL, data=DataSettings(sources=sources, **(shape | data)))


def test_names_with_brackets_are_no_markup():
    report = SourceReport("rows[/].json", 3, 3, [(1, 1, 1)], {}, {}, ["[/INST]", "[a]"])
    _, text = printed([report], settings({}))
    assert "rows[/].json" in text and "'[/INST]', '[a]'" in text


def printed(reports, settings):
    console = Console(file=io.StringIO(), width=140)
    failed = command.show(reports, settings, console)
    return failed, console.file.getvalue()


def test_the_report_counts_what_training_would_drop(tmp_path):
    sources = {"good": write_rows(tmp_path / "good", bad=False), "mixed": write_rows(tmp_path)}
    run = settings(sources)
    good, mixed = command.check(run, threads=2)
    assert (good.name, good.records, good.checked, good.good, good.images) == ("good", *[20] * 4)
    assert (mixed.records, mixed.checked, mixed.good, mixed.draws) == (24, 24, 20, 24)
    assert mixed.counts == dict(
        missing_image=1, corrupt_image=1, empty_answer=1, too_many_targets=1
    )
    assert good.bad_share == 0 and mixed.bad_share == pytest.approx(4 / 24)
    # 16x8 pixels are 2 patches and a newline, 24x24 are 9 and 3; "red" and its end are targets.
    assert [good.quantile(1, q) for q in (0.5, 1)] == [2, 9]
    assert {n for n, _, _ in good.sizes} == {good.quantile(0, 0.5), good.quantile(0, 0.5) + 9}
    assert good.quantile(2, 1) == 2
    failed, text = printed([good, mixed], run)
    assert failed and "gone.png" in text and "16.7%" in text
    assert "mixed: 16.7% would be dropped, and data.max_bad_share is 5.0%" in text
    assert "An epoch draws 44 records" in text
    assert not printed([good], run)[0]


def test_training_drops_the_very_same(tmp_path):
    run = settings({"mixed": write_rows(tmp_path)}, max_bad_share=1.0)
    (report,) = command.check(run)
    processor = blueprint(MODEL, LoRASettings(), 0).processor
    batches = train_iterator(run, processor, tmp_path / "run")
    listed = tmp_path / "run/skipped.jsonl"
    for _ in range(40):
        next(batches)
    batches.close()
    reasons = collections.Counter(json.loads(x)["reason"] for x in listed.read_text().splitlines())
    assert reasons == report.counts


def test_a_limit_is_spread_and_ids_given_twice_are_named(tmp_path):
    spec = write_rows(tmp_path, bad=False)
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows[10:]:
        row["id"] = "same"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert spread(20, 5) == [0, 4, 8, 12, 16] and spread(3, 5) == [0, 1, 2]
    run = settings({"a": spec})
    (report,) = command.check(run, limit=5)
    assert (report.checked, report.records, report.repeated) == (5, 20, ["same"])
    failed, text = printed([report], run)
    assert not failed and "a: 1 ids are given more than once: 'same'" in text
    with pytest.raises(MMJaxError, match="--limit=0"):
        command.check(run, limit=0)
    with pytest.raises(MMJaxError, match="--threads=0: records are read by 1"):
        command.check(run, threads=0)
    for wrong, told in (  # what a run refuses, and passed here
        (dict(workers=-1), "config.data.workers is -1"),
        (dict(max_bad_share=float("nan")), "max_bad_share nan is a share"),
        (dict(loss_weights={"b": 1.0}), "data.loss_weights names 'b'.* there are a"),
    ):
        with pytest.raises(MMJaxError, match=told):
            command.check(settings({"a": spec}, **wrong))


def test_what_would_stop_training_is_in_the_table_too(tmp_path, monkeypatch):
    run = settings({"a": write_rows(tmp_path, bad=False)})
    plan = blueprint(MODEL, LoRASettings(), 0)
    monkeypatch.setattr(
        type(plan.processor), "encode", lambda *a, **k: (_ for _ in ()).throw(KeyError("oh"))
    )
    (report,) = command.check(run)
    assert report.counts == {"stops_training": 20}
    assert report.first["stops_training"][0].startswith("record 0: KeyError: 'oh'")
    assert len(report.first["stops_training"]) == 3 and report.quantile(0, 1) == 0


def test_training_does_not_begin_when_every_answer_is_too_long(tmp_path):
    specs = {"fine": write_rows(tmp_path / "a", bad=False)}
    specs["long"] = write_rows(tmp_path / "b", bad=False)
    file = tmp_path / "b/rows.json"
    file.write_text(file.read_text().replace('"red"', '"red red red red red red red red"'))
    processor = blueprint(MODEL, LoRASettings(), 0).processor
    with pytest.raises(MMJaxError) as error:
        train_iterator(settings(specs), processor, tmp_path / "run")
    text = str(error.value)
    assert "source 'long': 20 of 20 training samples were unusable (too_many_targets: 20)" in text
    assert "9 target tokens, and a row holds 8; raise max_targets" in text
    load = train_loader(settings({"fine": specs["fine"]}), processor)
    assert load.shape == BatchShape(2, 40, 24, 8)
    require_some_good(load.mixture, load)


@pytest.mark.parametrize(
    "data, says",
    [
        (dict(weights={"b": 1.0}), r"weights for \['b'\], but sources \['a'\]"),
        (dict(weights={"a": 0.0}), "must all be positive"),
        (dict(counts={"a": 0}), "counts {'a': 0}"),
        (dict(template="fuyu_chatt"), "did you mean 'fuyu_chat'"),
        (dict(sources={"a": {"kind": "json", "path": "/gone.json"}}), "data.sources.a: /gone.json"),
        (dict(sources={}), "data.sources is empty"),
    ],
)
def test_mistakes_of_the_mixture_are_said_before_anything_is_read(tmp_path, data, says):
    run = settings(**({"sources": {"a": write_rows(tmp_path)}} | data))
    with pytest.raises(MMJaxError, match=says):
        command.check(run)


@pytest.mark.parametrize(
    "steps, told",
    [(0.4, "less than a step"), (1.2, "about one step"), (1499.6, "1,500 steps")],
)
def test_an_epoch_is_told_in_steps(steps, told):
    assert in_steps(steps) == told


def test_an_empty_report_divides_by_nothing():
    report = SourceReport("a", 5, 5)
    assert report.bad_share == 0 and report.mean_tokens() == 0 and report.quantile(0, 0.5) == 0


@pytest.mark.heavy
def test_the_command_prints_tables_and_its_exit_code(tmp_path):
    recipe = tmp_path / "recipe.py"
    spec = write_rows(tmp_path)
    recipe.write_text(
        "from mmjax.config import fill\nfrom mmjax.train.settings import RunSettings\n"
        f"def get_config():\n    return fill(RunSettings, dict(model=dict(config={SIZES}, "
        f"words={MODEL.words}), data=dict(sources=dict(train={spec}), seq_len=40, "
        "max_patches=24, max_targets=8, batch_size=2), lora=dict(rank=2)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mmjax.data.check", f"--config={recipe}", "--threads=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for part in ("Sources", "train", "16.7%", "What training would drop", "missing_image"):
        assert part in done.stdout


def test_files_of_one_length_and_two_versions_are_told_apart(tmp_path):
    spec = write_rows(tmp_path / "a", bad=True)
    path = tmp_path / "a/rows.json"
    text = path.read_text()

    def hashed(change):
        path.write_text(change(text))
        return fingerprint(make_source(spec), 24)

    first = hashed(lambda x: x)
    assert hashed(lambda x: x) == first  # and a record that cannot be read is none the less there
    assert hashed(lambda x: x.replace('"red"', '"wed"', 1)) != first
    assert hashed(lambda x: x.replace('"r3"', '"r9"')) != first
    assert hashed(lambda x: x.replace('"question": "what', '"questoin": "what', 1)) != first
    picture = tmp_path / "a/small.png"
    picture.write_bytes(picture.read_bytes() + b"more")
    assert hashed(lambda x: x) != first
    arrays, bytes_ = (
        [Record((Message("user", "q"),), (image,))]
        for image in (np.zeros((2, 2, 3), np.uint8), b"x")
    )
    frames = [Record((Message("user", "q"),), ((b"x", b"y"),))]
    assert len({fingerprint(arrays), fingerprint(bytes_), fingerprint(frames)}) == 3


def test_several_processes_compare_records_before_anything_is_made(tmp_path, monkeypatch):
    told = []

    def stop(facts):
        told.append(facts)
        raise MMJaxError("they differ")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "check_same", stop)
    run = settings({"mixed": write_rows(tmp_path)})
    processor = blueprint(MODEL, LoRASettings(), 0).processor
    with pytest.raises(MMJaxError, match="they differ"):
        train_iterator(run, processor, tmp_path / "run")
    assert told[0]["records of data.sources.mixed"] == 24
    want = fingerprint(make_source(run.data.sources["mixed"]))
    assert told[0]["the hash of some records of mixed"] == want
