"""Data workers that are killed, and what comes after."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from stub_processor import StubProcessor

from mmjax.data.pipeline import make_train_iterator
from mmjax.types import Message, MMJaxError, Record


class Deadly:
    """Record 7 kills the worker that reads it with SIGKILL, once, or every time."""

    def __init__(self, mark: Path, once: bool):
        self.mark, self.once, self.trainer = mark, once, os.getpid()

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i == 7 and os.getpid() != self.trainer and not (self.once and self.mark.exists()):
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Record(
            (Message("user", "q" * i), Message("assistant", f"a{i}")), (), {"id": f"r{i}"}
        )


class Stillborn(Deadly):
    """Every worker is killed before it has read where to start."""

    def __setstate__(self, state):
        self.__dict__ = state
        if os.getpid() != self.trainer:
            os.kill(os.getpid(), signal.SIGKILL)


class Broken(Deadly):
    """Record 7 raises what no source should."""

    def __getitem__(self, i):
        if i == 7:
            raise ZeroDivisionError("a fault in the source")
        return super().__getitem__(i)


def train(source, num_workers):
    return make_train_iterator(
        {"words": source}, "fuyu_chat", StubProcessor(), seq_len=96, max_patches=1, max_targets=24,
        batch_size=1, prefetch=1, num_workers=num_workers,
    )  # fmt: skip


def test_a_killed_worker_is_started_again_and_no_batch_is_lost_or_repeated(tmp_path):
    source = Deadly(tmp_path / "died", once=True)
    ours, plain = train(source, 1), train(source, 0)
    told = []
    ours.warn = told.append
    for _ in range(16):  # every record twice at least
        got, want = next(ours), next(plain)
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        assert ours.records == plain.records and ours.records[0]
    ours.close()
    assert source.mark.exists()
    assert len(told) == 1 and "died and is started again" in told[0] and "-9" in told[0]


@pytest.mark.heavy
def test_workers_start_in_a_script_that_parsed_no_flags(tmp_path):
    flags.FLAGS.unparse_flags()
    ours = train(Deadly(tmp_path, once=True), 1)
    try:
        assert next(ours)["tokens"].shape == (1, 96)
    finally:
        ours.close()
        flags.FLAGS.mark_as_parsed()


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [Deadly, pytest.param(Stillborn, marks=pytest.mark.heavy)])
def test_a_worker_that_dies_every_time_ends_the_run(kind, tmp_path):
    ours = train(kind(tmp_path / "died", once=False), 1)
    ours.warn = lambda text: None
    with pytest.raises(MMJaxError, match="died 4 times .*-9.*lower data.workers"):
        for _ in range(20):
            next(ours)
    ours.close()


def test_what_a_worker_raises_comes_through_with_its_traceback(tmp_path):
    ours = train(Broken(tmp_path, once=True), 1)
    with pytest.raises(ZeroDivisionError, match="a fault in the source") as error:
        for _ in range(20):
            next(ours)
    ours.close()
    assert "test_workers.py" in str(error.traceback[-1].path)


def test_rows_know_the_records_they_hold(tmp_path):
    it = train(Deadly(tmp_path, once=True), 0)
    seen = []
    for _ in range(8):
        batch = next(it)
        assert len(it.records) == 1
        assert len(it.records[0]) == batch["segment_ids"].max()
        seen += it.records[0]
    assert set(seen[:20]) <= {("words", f"r{i}") for i in range(20)}
    assert it.images == 0 and it.source_names == ("words",)


def test_a_worker_ends_whose_trainer_was_killed_while_it_started():
    worker = (
        "import multiprocessing, os, time, types\n"
        "from mmjax.data.workers import prepare_worker\n"
        "gone = types.SimpleNamespace(pid=os.getppid() + 1)\n"  # another process is the parent now
        "multiprocessing.parent_process = lambda: gone\n"
        "prepare_worker(0, 1)\ntime.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", worker], timeout=30).returncode == 1


def test_a_worker_ends_with_the_trainer_that_was_killed():
    """The trainer here starts a process that prepares itself as a worker, and kills itself."""
    worker = (
        "from mmjax.data.workers import prepare_worker\nimport time\n"
        "prepare_worker(0, 1)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    trainer = (
        "import os, signal, subprocess, sys\n"
        f"w = subprocess.Popen([sys.executable, '-c', {worker!r}], stdout=subprocess.PIPE)\n"
        "w.stdout.readline()\n"
        "os.kill(w.pid, signal.SIGINT)\n"  # Ctrl-C is the trainer's business
        "print(w.pid, w.poll(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", trainer], capture_output=True, text=True)
    pid, code = done.stdout.split()
    assert code == "None" and done.returncode == -signal.SIGKILL
    watched = subprocess.run(["tail", f"--pid={pid}", "-f", "/dev/null"], timeout=30)
    assert watched.returncode == 0
