"""One run at a time in a workdir."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from mmjax.train import changes, loop, workdir
from mmjax.train.settings import DataSettings, ModelSettings, RunSettings
from mmjax.types import MMJaxError

OTHER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on node3", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_workdir_that_another_process_runs_in_is_refused(tmp_path):
    command = [sys.executable, "-c", OTHER, str(tmp_path / workdir.LOCK)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(MMJaxError, match=r"in use by process 7 on node3.*another --workdir"):
            loop.run(RunSettings(), tmp_path)
        other.kill()  # a lock needs no cleaning up
    assert [p.name for p in tmp_path.iterdir()] == [workdir.LOCK]
    with workdir.held(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / workdir.LOCK).read_text()


def test_a_workdir_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path, says in (("file", "File exists"), ("file/run", "Not a directory")):
        with pytest.raises(
            MMJaxError, match=f"{path} cannot be written: {says}; choose a --workdir"
        ):
            loop.run(RunSettings(), tmp_path / path)


def test_the_config_is_written_whole(tmp_path):
    workdir.write_config(RunSettings(name="one"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "one"
    assert not (tmp_path / "config.json.part").exists()
    (tmp_path / "config.json.part").mkdir()  # as good as a full disk
    with pytest.raises(MMJaxError, match="cannot be written: Is a directory"):
        workdir.write_config(RunSettings(), tmp_path)


def test_what_has_changed_since_is_told_by_name(tmp_path):
    assert changes.changed(RunSettings(), tmp_path) == {}  # never started
    model = ModelSettings(init="/a", processor={"max_height": 48})
    first = RunSettings(model=model, data=DataSettings({"train": {"kind": "sums"}}, lengths=(8,)))
    workdir.write_config(first, tmp_path)
    assert changes.changed(first, tmp_path) == {}
    model = ModelSettings(init="/b", processor={"max_width": None})
    data = DataSettings({"train": {"kind": "json"}}, lengths=(8,))
    now = dataclasses.replace(first, model=model, data=data, steps=12)
    assert list(changes.changed(now, tmp_path).values()) == [
        "config.steps was 1000 and is 12",
        "config.model.init was '/a' and is '/b'",
        "config.model.processor.max_width was not set and is None",
        "config.model.processor.max_height was 48 and is not set",
        "config.data.sources.train.kind was 'sums' and is 'json'",
    ]
    older = json.loads((tmp_path / "config.json").read_text())
    del older["bad_steps"], older["data"]["lengths"]  # settings that it did not have
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert list(changes.changed(first, tmp_path)) == ["config.data.lengths"]
    (tmp_path / "config.json").write_text("{")
    assert changes.changed(first, tmp_path) == {}


def test_a_frozen_part_from_another_place_is_warned_of(tmp_path):
    """A checkpoint holds what is trained alone: beside another model it is worth nothing."""
    first = RunSettings(model=ModelSettings(init="a", parts={"vision": "x"}))
    (tmp_path / "config.json").write_text(changes.as_json(first))
    for model in (ModelSettings(init="b"), ModelSettings(init="a", parts={"vision": "y"})):
        found = changes.changed(dataclasses.replace(first, model=model), tmp_path)
        (line,) = changes.about_frozen(found, frozen=True)
        assert line.startswith("warning") and "config.model." in line
        assert changes.about_frozen(found, frozen=False) == []
    other = dataclasses.replace(first, steps=7)
    assert changes.about_frozen(changes.changed(other, tmp_path), frozen=True) == []
