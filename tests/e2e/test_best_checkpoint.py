"""The best checkpoint is one that was evaluated; a run that cannot go on changes nothing."""

import dataclasses
import json
import os
import signal

import jax
import pytest
from test_bad_input import settings, write_data

from mmjax.checkpoint import CheckpointSettings
from mmjax.checkpoint_steps import find_step
from mmjax.parallel.mesh import make_mesh
from mmjax.train import loop
from mmjax.train.settings import EvalSettings
from mmjax.types import MMJaxError
from mmjax.weights.writer import atomic_folder
from tests.e2e.faults import saved_steps

BEST = "eval/vqa/accuracy"
SCORES = {2: 0.9, 4: 0.5, 6: 0.95}


def asked_every_two_steps(data, *, steps, **checkpoint):
    """The settings of a run that is evaluated at every second step, and not at its end."""
    plain = settings(write_data(data))
    task = {"name": "vqa", "source": plain.data.sources["train"]}
    return dataclasses.replace(
        plain, steps=steps, checkpoint=CheckpointSettings(export=False, **checkpoint),
        eval=EvalSettings(tasks=(task,), every=2, limit=2, final=False),
    )  # fmt: skip


@pytest.mark.heavy
def test_a_checkpoint_has_the_scores_of_its_own_step_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))
    asked = iter(SCORES.values())
    monkeypatch.setattr(loop.evaluation, "sample", lambda *_: {BEST: next(asked)})
    plain = asked_every_two_steps(tmp_path / "data", steps=5, every=1, keep=1, best=BEST)
    workdir = tmp_path / "run"
    metrics = loop.run(plain, workdir)
    assert metrics[BEST] == SCORES[4] and metrics["eval/vqa/loss"] > 0
    assert saved_steps(workdir) == [2, 5] and find_step(workdir, BEST) == (workdir, 2)
    # The last step is scored too: it may be the best.
    loop.run(dataclasses.replace(plain, steps=6), workdir)
    assert saved_steps(workdir) == [6] and find_step(workdir, BEST) == (workdir, 6)
    with pytest.raises(MMJaxError, match=r"stands at step 6 and config.steps is 3"):
        loop.run(dataclasses.replace(plain, steps=3), workdir)
    assert json.loads((workdir / "config.json").read_text())["steps"] == 6


@pytest.mark.heavy
def test_an_evaluation_that_a_signal_ends_is_made_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))
    plain = asked_every_two_steps(tmp_path / "data", steps=3, every=9)

    def scores(name):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["eval/vqa/loss"]) for row in rows if "eval/vqa/loss" in row]

    loop.run(plain, tmp_path / "undisturbed")
    sample, signals = loop.evaluation.sample, [signal.SIGTERM]

    def disturbed(*args):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return sample(*args)

    monkeypatch.setattr(loop.evaluation, "sample", disturbed)
    loop.run(plain, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [2] and scores("run") == []
    loop.run(plain, tmp_path / "run")
    assert scores("run") == scores("undisturbed") and len(scores("run")) == 1


@pytest.mark.heavy
def test_a_step_whose_evaluation_a_signal_ends_may_be_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))
    plain = asked_every_two_steps(tmp_path / "data", steps=4, every=1, keep=1, best=BEST)
    scores, signals = iter([0.0, 0.9, 0.5]), [signal.SIGTERM]

    def disturbed(*_):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return {BEST: next(scores)}

    monkeypatch.setattr(loop.evaluation, "sample", disturbed)
    loop.run(plain, tmp_path / "run")
    loop.run(plain, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [2, 4]
    assert find_step(tmp_path / "run", BEST) == (tmp_path / "run", 2)


@pytest.mark.heavy
def test_a_model_that_finds_no_room_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        with atomic_folder(tmp_path / "run/model", nbytes=10**18):
            raise AssertionError

    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))
    monkeypatch.setattr(loop, "export_model", full)
    plain = settings(write_data(tmp_path / "data"))
    plain = dataclasses.replace(plain, steps=1, checkpoint=CheckpointSettings(export=True))
    told = "model cannot be written: No space left on device; step 1 is saved: make room and start"
    with pytest.raises(MMJaxError, match=told):
        loop.run(plain, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [1]
