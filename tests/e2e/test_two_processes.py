"""Two real processes through jax.distributed: the curve of one, and what ends or parts them."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.e2e.faults import ROOT, logged, parameters, saved_steps

STEPS, EVERY = 20, 5
KEEP = "checkpoint.keep=100"
# The rate is the same at every step, so that losses do not depend on how many there are to be.
SMALL = (
    "optim.schedule=constant",
    "optim.warmup=0",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=32",
)

TASK = {"name": "long", "source": {"kind": "sums", "split": "test", "size": 10**6}}
LONG = (f"eval.tasks={[TASK]}", f"eval.limit={10**6}", "eval.batch_size=4")


def command(workdir, *more):
    settings = (
        f"steps={STEPS}", f"checkpoint.every={EVERY}", "log.every=1", "log.tensorboard=False",
        "eval.final=False", "data.batch_size=4", "data.streams=2", *SMALL, *more,
    )  # fmt: skip
    config = f"--config={ROOT}/configs/quickstart.py:quick"
    command = [sys.executable, str(ROOT / "train.py"), config]
    return [*command, f"--workdir={workdir}", *(f"--config.{s}" for s in settings)]


def losses(workdir):
    """The loss of every step; of steps that ran twice, the last."""
    return {step: values["train/loss"] for step, values in logged(workdir)}


def start(workdir, processes, *each, cwd=(ROOT, ROOT)):
    """Start a run of one process with two devices, or of two with one.

    each: own arguments; cwd: the folders they are started in.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for i in range(processes):
        env = os.environ | {"XDG_CACHE_HOME": str(ROOT / ".cache"), "PYTHONUNBUFFERED": "1"}
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        env["JAX_NUM_CPU_DEVICES"] = str(2 // processes)
        if processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            env["JAX_PROCESS_ID"] = str(i)
        started.append(
            subprocess.Popen(
                command(workdir, *(each[i] if each else ())), cwd=cwd[i], env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return started


def finish(started):
    """Wait for all; returns their exit codes and what they printed."""
    out = [process.communicate(timeout=120)[0] for process in started]
    return [process.returncode for process in started], out


def wait_for_save(started, workdir, step):
    """Wait until a finished checkpoint at or behind ``step`` is on disk."""
    wait_for(started, lambda: any(s >= step for s in saved_steps(workdir)))


def wait_for(started, happened):
    """Wait until something has happened, while all processes run."""
    while not happened():
        for process in started:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)  # polling a real process; nothing is asserted about time


def assert_same_place(workdir, other, step):
    """Each stream stands where it does in the other run: the same records."""
    files = sorted(p.name for p in (workdir / f"checkpoints/{step}/data").glob("*.json"))
    assert files == ["stream_0-of-2.json", "stream_1-of-2.json"]
    for file in files:
        place = f"checkpoints/{step}/data/{file}"
        assert (workdir / place).read_text() == (other / place).read_text()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    codes, out = finish(start(workdir, 1, [KEEP]))
    assert codes == [0], out
    assert len(losses(workdir)) == STEPS
    return workdir


@pytest.mark.heavy
def test_two_processes_train_like_one(one, tmp_path):
    codes, out = finish(start(tmp_path, 2))
    assert codes == [0, 0], out
    assert "process 1 of 2 (environment)" in out[1]
    mine, theirs = losses(tmp_path), losses(one)
    assert mine == pytest.approx(theirs, rel=1e-5)
    ours, exported = parameters(tmp_path), parameters(one)
    assert ours.keys() == exported.keys()
    for name, value in exported.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert_same_place(tmp_path, one, STEPS)


@pytest.mark.heavy
def test_sigterm_in_one_stops_both_and_one_alone_goes_on(one, tmp_path):
    # In an evaluation that would take hours; both stop at the same place.
    stood = EVERY + 2
    started = start(tmp_path, 2, *[[*endless(), f"eval.every={stood}", *LONG]] * 2)
    wait_for(started, lambda: stood in losses(tmp_path))
    started[1].send_signal(signal.SIGTERM)
    codes, out = finish(started)
    assert codes == [0, 0] and f"SIGTERM: saved step {stood}" in out[0], out
    assert max(losses(tmp_path)) == saved_steps(tmp_path)[-1] == stood
    goes_on_alone(tmp_path, one)


@pytest.mark.heavy
def test_a_killed_one_ends_the_other_and_one_alone_goes_on(one, tmp_path):
    started = start(tmp_path, 2, endless(), endless())
    wait_for_save(started, tmp_path, EVERY)
    started[1].send_signal(signal.SIGKILL)
    codes, out = finish(started)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    # Ours when a collective breaks; JAX's own where its coordinator sees it first.
    assert "another process has ended" in out[0] or "another task died" in out[0], out
    goes_on_alone(tmp_path, one)


def goes_on_alone(workdir, one):
    """One process goes on where two were stopped, along the curve that one had from the start."""
    stood = saved_steps(workdir)[-1]
    steps = max(stood + EVERY, STEPS)
    codes, out = finish(start(workdir, 1, [f"steps={steps}", KEEP]))
    assert codes == [0] and f"continuing at step {stood}" in out[0], out
    mine, theirs = losses(workdir), losses(one)
    assert {step: mine[step] for step in theirs} == pytest.approx(theirs, rel=1e-5)
    assert_same_place(workdir, one, EVERY)


@pytest.mark.heavy
def test_a_disk_that_one_process_cannot_write_ends_both(tmp_path):
    started = start(tmp_path, 2, endless(), endless())
    wait_for_save(started, tmp_path, EVERY)
    resource.prlimit(started[1].pid, resource.RLIMIT_FSIZE, (1024, -1))
    codes, out = finish(started)
    assert codes == [2, 2], out
    good = saved_steps(tmp_path)[-1]
    for text in out:
        assert "in process 1 of 2, and the others wait for what is missing" in text
        assert f"the last good checkpoint is step {good}. Mend the disk" in text
    assert "File too large in process 1 of 2" in out[1]
    assert finish(start(tmp_path, 2, *[[f"steps={good + 1}", "eval.tasks=[]"]] * 2))[0] == [0, 0]


def endless():
    """Arguments of a run that only a signal ends."""
    return [f"steps={10**6}", KEEP, "eval.tasks=[]"]


def test_processes_that_differ_are_told_apart_before_anything_is_made(tmp_path):
    # Of so many sources that what there is to compare is more than 64 KiB.
    many = {f"source_{i:03}": {"kind": "sums", "split": "train"} for i in range(400)}
    own = ([f"data.sources={many}", f"optim.lr={rate}"] for rate in ("1e-3", "1e-4"))
    codes, out = finish(start(tmp_path, 2, *own))
    assert codes == [2, 2], out
    for text in out:
        assert "config.optim.lr is 0.001 in process 0 and 0.0001 in process 1" in text
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.heavy
def test_a_workdir_that_is_not_shared_is_told_before_the_first_step(tmp_path):
    # One name for two folders, as a local disk has it on two hosts.
    own = [tmp_path / "host0", tmp_path / "host1"]
    for folder in own:
        folder.mkdir()
    codes, out = finish(start("/proc/self/cwd/run", 2, cwd=own))
    assert codes == [2, 2], out
    for text in out:
        assert "--workdir /proc/self/cwd/run is not the same folder in process 1 as in" in text
    left = {p.name for p in (own[0] / "run").iterdir()}
    assert not left & {"checkpoints", "config.json"} and not any("shared" in x for x in left)
    assert not (own[1] / "run" / "checkpoints").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("differs", ["a question", "a picture that one lacks"])
def test_questions_that_differ_between_hosts_are_told(tmp_path, differs):
    # One name for two files, as local disks have it: each host would answer its own questions.
    own = [tmp_path / "host0", tmp_path / "host1"]
    rows = [{"question": f"what is {i}", "answers": ["4"]} for i in range(3)]
    for folder in own:
        folder.mkdir()
        rows[1]["image"] = "1.png"
        Image.new("RGB", (16, 16), (9, 8, 7)).save(folder / "1.png")
        (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows[0]["question"] += " more" * (differs == "a question")
    if differs != "a question":
        (own[1] / "1.png").unlink()
    task = {"name": "q", "source": {"kind": "json", "path": "q.jsonl"}}
    asked = [f"eval.tasks={[task]}", "eval.every=2", "eval.limit=3"]
    codes, out = finish(start(tmp_path / "run", 2, asked, asked, cwd=own))
    assert codes == [2, 2], out
    for text in out:
        assert "the processes of this run do not agree: the hash of " in text, text
