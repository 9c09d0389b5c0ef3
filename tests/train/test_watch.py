"""Watching the steps: the list of bad ones, and where the clock begins."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mmjax.monitor.meter import Meter
from mmjax.monitor.writers import MultiWriter
from mmjax.train.reports import Reports
from mmjax.train.settings import DataSettings, LogSettings, RunSettings
from mmjax.train.step import BadStepSettings
from mmjax.train.watch import StepWatch


def watched(folder, warned, *sources, every=1):
    line = SimpleNamespace(warn=warned.append, update=lambda *_: None)
    return StepWatch(
        BadStepSettings("skip"), folder, every=every, writer=MultiWriter(), meter=Meter(9),
        line=line, source_names=sources or ("vqa",), last_checkpoint=lambda: None,
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


def test_the_last_step_is_logged_and_of_sources_those_it_held(tmp_path):
    watch = watched(tmp_path, [], "vqa", "text", every=4)
    sources = {"source_loss": np.array([2.0, 0.0]), "source_targets": np.array([3, 0])}
    values = {"loss": np.float32(2.0), "bad": False} | sources
    watch.expect(5, dict(values), [])
    assert watch.settle() == {}
    watch.expect(6, dict(values), [])
    logged = watch.settle(last=True)
    assert logged["train/loss/vqa"] == 2.0 and "train/loss/text" not in logged


def test_the_first_step_is_left_out_whole_though_it_is_only_dispatched():
    """The second one is measured from where the device is done with the first."""
    now, ready = [0.0], [0.0]

    class OnDevice:  # each step takes two seconds, one behind the other
        def __init__(self):
            ready[0] = max(now[0], ready[0]) + 2.0
            self.done = ready[0]

        def block_until_ready(self):
            now[0] = max(now[0], self.done)

    under_way = []

    def settle():
        while under_way:
            under_way.pop().block_until_ready()
        return {}

    reports = object.__new__(Reports)
    reports._first, reports._flops, reports._settings = 5, lambda _: 0.0, RunSettings()
    reports._batches = SimpleNamespace(records=[], images=0)
    reports.meter = Meter(9, start_step=5, clock=lambda: now[0])
    reports.watch = SimpleNamespace(
        settle=settle, expect=lambda step, metrics, _: under_way.append(metrics["loss"])
    )
    for step in (6, 7):
        local = {"tokens": np.ones((1, 3)), "segment_ids": np.ones((1, 3))}
        reports.started(step, {"loss": OnDevice()}, local)
    settle()
    assert reports.meter.report()["perf/step_s"] == 2.0


@pytest.mark.parametrize("every, lead, drawn", [(2, True, [2, 4]), (0, True, []), (2, False, [])])
def test_batches_are_drawn_when_they_are_due(every, lead, drawn):
    reports, steps, told = object.__new__(Reports), [], []
    reports._settings = RunSettings(log=LogSettings(pictures=every, samples=3))
    reports._lead, reports.meter = lead, Meter(9)
    reports._draw = lambda step, local: steps.append(step)
    reports._samples = lambda step, *_: told.append(step) or ""
    reports._batches = SimpleNamespace(records=[])
    reports.line = SimpleNamespace(print=lambda text: None)
    state = SimpleNamespace(params=None)
    for step in range(1, 6):
        reports.picture(step, {})
        reports.sample(step, {}, {}, state, None)
    assert steps == drawn and told == [3]


def test_a_process_counts_for_all_of_them():
    """A batch of 8 of which this process has 2: everything is counted four times."""
    reports, counted = object.__new__(Reports), []
    reports._first, reports._flops = 0, lambda local: 5.0
    reports._settings = RunSettings(data=DataSettings(batch_size=8))
    reports._batches = SimpleNamespace(records=[["a"], ["b", "c"]], images=4)
    reports.watch = SimpleNamespace(settle=lambda: {}, expect=lambda *_: None)
    reports.meter = SimpleNamespace(step=lambda **numbers: counted.append(numbers))
    local = {"tokens": np.ones((2, 3)), "segment_ids": np.array([[1, 1, 0], [1, 2, 2]])}
    reports.started(2, {}, local)
    assert counted == [{"tokens": 20, "images": 16, "samples": 12, "flops": 5.0}]
