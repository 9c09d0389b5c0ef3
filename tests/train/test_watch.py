"""Bad steps, where their list cannot be written."""

from types import SimpleNamespace

import numpy as np

from mmjax.monitor.meter import Meter
from mmjax.monitor.writers import MultiWriter
from mmjax.train.watch import BadStepSettings, StepWatch


def test_a_bad_step_is_told_and_counted_though_its_list_cannot_be_written(tmp_path):
    warned = []
    line = SimpleNamespace(warn=warned.append, update=lambda *_: None)
    (tmp_path / "bad_steps.jsonl").mkdir()  # as good as a full disk
    watch = StepWatch(
        BadStepSettings("skip"), tmp_path, every=1, writer=MultiWriter(), meter=Meter(9), line=line,
        source_names=("vqa",), last_checkpoint=lambda: None,
    )  # fmt: skip
    values = {"loss": np.nan, "grad_norm": np.nan, "bad": True}
    sources = {"source_loss": np.zeros(1), "source_targets": np.zeros(1)}
    watch.expect(3, values | sources, [[("vqa", "7")]])
    assert np.isnan(watch.settle()["train/loss"]) and watch.bad == 1
    unwritten, skipped = warned
    assert "bad_steps.jsonl could not be written" in unwritten and "('vqa', '7')" in unwritten
    assert "skipped a bad step (1 of 10): at step 3 the loss is nan" in skipped
