"""Real processes, real signals: a run that is killed loses nothing but the steps since its save."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmjax.config import resolve_recipe, to_dataclass
from mmjax.train.loop import run
from mmjax.train.settings import RunSettings
from mmjax.types import MMJaxError

ROOT = Path(__file__).parents[2]
RECIPE = "--config=configs/quickstart.py:quick"
STEPS, EVERY = 60, 10


def command(workdir, *more):
    return [
        sys.executable, "train.py", RECIPE, f"--workdir={workdir}", f"--config.steps={STEPS}",
        f"--config.checkpoint.every={EVERY}", "--config.eval.final=False", "--config.log.every=1",
        *more,
    ]  # fmt: skip


def environment():
    return os.environ | {"XDG_CACHE_HOME": str(ROOT / ".cache"), "PYTHONUNBUFFERED": "1"}


def start(workdir, *more):
    return subprocess.Popen(
        command(workdir, *more), cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process):
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


def saved_steps(workdir):
    folder = Path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def wait_for_save(process, workdir, step):
    """Wait until a finished checkpoint at or behind ``step`` is on disk."""
    while not any(s >= step for s in saved_steps(workdir)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)  # polling a real process; nothing is asserted about time


def losses(workdir):
    """The loss of every step; of steps that ran twice, the last."""
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def parameters(workdir):
    from mmjax.weights.store import StoreReader

    reader = StoreReader(Path(workdir) / "model" / "params")
    return {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, out = finish(start(workdir))
    assert code == 0, out
    return workdir


def assert_equal_runs(workdir, other):
    assert losses(workdir) == losses(other)
    ours, theirs = parameters(workdir), parameters(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_kill_9_and_restart_equal_an_undisturbed_run_bit_for_bit(undisturbed, tmp_path):
    process = start(tmp_path)
    wait_for_save(process, tmp_path, EVERY)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    stood = saved_steps(tmp_path)[-1]
    assert stood < STEPS
    code, out = finish(start(tmp_path))
    assert code == 0, out
    assert f"continuing at step {stood}" in out
    assert_equal_runs(tmp_path, undisturbed)


def test_sigterm_saves_and_exits_0_and_the_next_start_goes_on(undisturbed, tmp_path):
    process = start(tmp_path)
    wait_for_save(process, tmp_path, EVERY)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 0, out
    assert "SIGTERM: saved step" in out
    stood = saved_steps(tmp_path)[-1]
    assert stood < STEPS
    assert max(losses(tmp_path)) == stood
    code, out = finish(start(tmp_path))
    assert code == 0 and f"continuing at step {stood}" in out, out
    assert_equal_runs(tmp_path, undisturbed)


def test_a_finished_run_has_nothing_left_to_do(undisturbed):
    before = losses(undisturbed)
    code, out = finish(start(undisturbed))
    assert code == 0, out
    assert losses(undisturbed) == before


@pytest.mark.parametrize(
    "override, says",
    [
        ("optim.lrr=1", ["optim.lrr", "optim.lr"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),
        ("steps=0", ["config.steps is 0"]),
        ("mesh.fsdp=3", ["needs 3 devices"]),
        ("data.batch_size=3", ["batch_size 3 does not divide", "fsdp 8"]),
        ("freeze=('vision.*',)", ["vision.*", "matches no parameter"]),
        ("model.init=/nowhere/fuyu", ["/nowhere/fuyu"]),
    ],
)
def test_mistakes_are_named_before_anything_is_built(override, says, tmp_path):
    with pytest.raises(MMJaxError) as error:
        config = resolve_recipe("configs/quickstart.py:quick", ["data.batch_size=8", override])
        run(to_dataclass(RunSettings, config), tmp_path / "run")
    for text in says:
        assert text in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
