"""The list of bad steps: records with odd names, and a disk that cannot be written."""

import json
from types import SimpleNamespace

import numpy as np

from mmjax.monitor.meter import Meter
from mmjax.monitor.writers import MultiWriter
from mmjax.train.step import BadStepSettings
from mmjax.train.watch import StepWatch


def watched(folder, warned):
    line = SimpleNamespace(warn=warned.append, update=lambda *_: None)
    return StepWatch(
        BadStepSettings("skip"), folder, every=1, writer=MultiWriter(), meter=Meter(9), line=line,
        source_names=("vqa",), last_checkpoint=lambda: None,
    )  # fmt: skip


def bad_values():
    sources = {"source_loss": np.zeros(1), "source_targets": np.zeros(1)}
    return {"loss": np.nan, "grad_norm": np.nan, "bad": True} | sources


def test_a_bad_step_of_a_record_with_half_a_character_is_listed(tmp_path):
    watch = watched(tmp_path, [])
    watch.expect(3, bad_values(), [[("vqa", "7\ud83d")]])
    watch.settle()
    (row,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text("utf-8").splitlines())
    assert row["records"] == [["vqa", "7\ud83d"]]


def test_a_bad_step_is_told_and_counted_though_its_list_cannot_be_written(tmp_path):
    warned = []
    (tmp_path / "bad_steps.jsonl").mkdir()  # as good as a full disk
    watch = watched(tmp_path, warned)
    watch.expect(3, bad_values(), [[("vqa", "7")]])
    assert np.isnan(watch.settle()["train/loss"]) and watch.bad == 1
    unwritten, skipped = warned
    assert "bad_steps.jsonl could not be written" in unwritten and "('vqa', '7')" in unwritten
    assert "skipped a bad step (1 of 10): at step 3 the loss is nan" in skipped
