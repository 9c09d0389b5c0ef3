"""What goes wrong around a run: a full disk, and steps whose loss is no number."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_bad_input import settings, write_data

from mmjax.monitor.terminal import LiveLine
from mmjax.parallel.mesh import make_mesh
from mmjax.schema import to_dataclass
from mmjax.train import loop
from mmjax.train.settings import CheckpointSettings
from mmjax.train.step import BadStepSettings
from mmjax.types import MMJaxError
from tests.e2e import faults

RECIPE = faults.Recipe(steps=90)


class SmallDisk:
    """A file system of 6 MiB of its own for one process, and a way to fill it.

    Where mounting one is not allowed, the process may write no file above 1 KiB instead.
    """

    def __init__(self, workdir: Path):
        workdir.mkdir()
        self.workdir = workdir
        mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=6m tmpfs "$0" && exec "$@"')
        self.prefix = (*mount, str(workdir))
        with contextlib.suppress(OSError):
            if subprocess.run([*self.prefix, "true"], capture_output=True).returncode == 0:
                return
        self.prefix = ()

    def start(self) -> subprocess.Popen:
        self.process = RECIPE.start(self.workdir, prefix=self.prefix)
        return self.process

    @property
    def inside(self) -> Path:
        """The workdir as the process sees it."""
        return Path(f"/proc/{self.process.pid}/root{self.workdir}") if self.prefix else self.workdir

    def fill(self) -> None:
        if not self.prefix:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (1024, -1))
            return
        with contextlib.suppress(OSError), open(self.inside / "ballast", "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        if not self.prefix:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (-1, -1))
            return
        (self.inside / "ballast").unlink()


@pytest.mark.heavy
def test_a_full_disk_is_told_and_training_goes_on(tmp_path):
    disk = SmallDisk(tmp_path / "run")
    process = disk.start()
    assert faults.wait_for(lambda: faults.saved_steps(disk.inside), process), faults.log_text(
        disk.workdir
    )

    def told():
        disk.fill()
        return re.search(
            r"step (\d+) \(([\d.]+) KiB\) could not be saved to (\S+): "
            r"(?:No space left|File too large).* are free\)\. "
            r"The last good checkpoint is step (\d+);",
            faults.log_text(disk.workdir),
        )

    assert faults.wait_for(told, process), faults.log_text(disk.workdir)
    failed, size, path, good = told().groups()
    assert path == f"{disk.workdir}/checkpoints/{failed}" and float(size) > 100
    # While it is full, the last good checkpoint is whole: a copy of it can be gone on from.
    copy = tmp_path / "copy"
    shutil.copytree(disk.inside / "checkpoints" / good, copy / "checkpoints" / good)
    disk.free()
    later = [int(failed) + RECIPE.every]
    assert faults.wait_for(lambda: faults.saved_steps(disk.inside)[-1:] >= later, process)
    assert faults.wait_for(lambda: (disk.inside / "model/config.json").exists(), process)
    parameters = faults.parameters(disk.inside)
    code, out = faults.finish(process, disk.workdir)
    assert code == 0, out
    code, out = faults.finish(RECIPE.start(copy), copy)
    assert code == 0 and f"continuing at step {good}" in out, out
    for name, value in faults.parameters(copy).items():
        np.testing.assert_array_equal(value, parameters[name], err_msg=name)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))


@pytest.fixture
def quiet(tmp_path, one_device):
    """Settings of a run in this process that saves every second step, and its workdir."""
    plain = settings(write_data(tmp_path / "data"))
    log = dataclasses.replace(plain.log, every=1)
    return dataclasses.replace(
        plain, log=log, checkpoint=CheckpointSettings(every=2, export=False)
    ), tmp_path / "run"


def listed(workdir):
    return [json.loads(line) for line in (workdir / "bad_steps.jsonl").read_text().splitlines()]


def test_a_loss_that_is_no_number_stops_with_its_step_records_and_checkpoint(quiet, monkeypatch):
    plain, workdir = quiet
    plain = dataclasses.replace(plain, steps=4)
    loop.run(plain, workdir)
    wild = dataclasses.replace(plain.optim, lr=1e30, warmup=0, schedule="constant", clip_norm=0.0)
    closed = []
    monkeypatch.setattr(LiveLine, "close", lambda line: closed.append(line))
    with pytest.raises(MMJaxError) as error:
        loop.run(dataclasses.replace(plain, optim=wild, steps=9), workdir)
    assert len(closed) == 1  # the terminal has its cursor back
    text = str(error.value)
    step = int(re.search(r"at step (\d+) the loss is (nan|inf|\d)", text)[1])
    assert 5 < step < 9  # the step after the first wild update, or one more
    assert re.search(r"records: train/good\d, train/good\d", text)
    assert f"last good checkpoint: step {(step - 1) // 2 * 2}" in text
    assert "bad_steps.action='skip'" in text
    row = listed(workdir)[-1]
    assert row["step"] == step and all(name.startswith("good") for _, name in row["records"])


@pytest.mark.heavy
def test_bad_steps_are_skipped_counted_and_limited_over_restarts(quiet):
    plain, workdir = quiet
    strict = BadStepSettings("skip", limit=6, max_loss=1e-3)  # every step is bad
    plain = dataclasses.replace(plain, bad_steps=strict)
    metrics = loop.run(dataclasses.replace(plain, steps=4), workdir)
    assert metrics["train/bad_steps"] == 4
    with pytest.raises(MMJaxError, match=r"at step 7 .*Stopped after 6 skipped.*step 6"):
        loop.run(plain, workdir)
    assert [row["step"] for row in listed(workdir)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.heavy
def test_a_run_whose_reader_has_ended_saves(quiet, monkeypatch):
    plain, workdir = quiet
    plain = dataclasses.replace(plain, steps=9, checkpoint=CheckpointSettings(export=False))
    monkeypatch.setattr(loop.startup, "print_startup", lambda *_: None)
    reader, writer = os.pipe()
    os.close(reader)
    file = open(writer, "w")  # noqa: SIM115 - closed below
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        loop.run(plain, workdir)
    with contextlib.suppress(BrokenPipeError):
        file.close()
    (stood,) = faults.saved_steps(workdir)
    assert 0 < stood < 9


def test_settings_of_bad_steps_are_checked():
    with pytest.raises(MMJaxError, match="bad_steps.action"):
        to_dataclass(type(settings("x")), {"bad_steps": {"action": "ignore"}})
