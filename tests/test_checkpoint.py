"""Training checkpoints: what stays, what comes back on which mesh, and what is refused."""

import asyncio
import dataclasses
import gc
import json
import re
import shutil
import threading
import time
import warnings

import grain
import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint._src.path import storage_backend

from mmjax import checkpoint_failures
from mmjax.checkpoint import CheckpointManager, CheckpointSettings
from mmjax.checkpoint_steps import FOLDER, find_step, load_params
from mmjax.nn import paths
from mmjax.parallel import distributed
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train import optim, state
from mmjax.types import MMJaxError
from tests import tiny

TX = optim.make_optimizer(optim.OptimSettings(), 10)


def numbers():
    """A data iterator: 0, 1, 2, ..."""
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def build(mesh, config=tiny.CONFIG):
    def make():
        return tiny.Fuyu(config, rngs=nnx.Rngs(0))

    names = set(paths.flatten(nnx.state(nnx.eval_shape(make))))
    abstract = state.abstract_state(make, names, TX, mesh)[1]
    return abstract, state.init(make, names, TX, mesh)[1]


def opened(workdir, **kwargs):
    return CheckpointManager(workdir, CheckpointSettings(**kwargs), about={"name": "test"})


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / FOLDER).iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with step 5, saved from one device, and the state that was saved."""
    workdir = tmp_path_factory.mktemp("saved")
    data = numbers()
    assert [next(data) for _ in range(3)] == [0, 1, 2]
    with use() as mesh:
        _, train = build(mesh)
        checkpoints = opened(workdir)
        checkpoints.save(5, train, data, {"train/loss": 2.0})
        checkpoints.close()
    return workdir, jax.device_get(train)


def test_the_newest_n_and_the_best_stay(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.6, 5: 0.1}
    with use() as mesh:
        _, train = build(mesh)
        checkpoints = opened(tmp_path, keep=2, best="eval/accuracy")
        for step, score in scores.items():
            checkpoints.save(step, train, numbers(), {"eval/accuracy": score})
            checkpoints.wait()
        checkpoints.close()
    assert steps(tmp_path) == [2, 4, 5]
    assert find_step(tmp_path) == (tmp_path, 5)
    assert find_step(tmp_path, "eval/accuracy") == (tmp_path, 2)
    assert find_step(tmp_path, "eval/nothing") == (tmp_path, 5)
    assert find_step(tmp_path / FOLDER / "4") == (tmp_path, 4)


def test_a_step_that_is_measured_behind_its_save_can_be_the_best(tmp_path):
    """So it is where a signal ends an evaluation, which the next start then makes."""
    with use() as mesh:
        _, train = build(mesh)
        checkpoints = opened(tmp_path, keep=1, best="eval/accuracy")
        checkpoints.save(1, train, numbers(), {"train/loss": 2.0})
        checkpoints.add_metrics(1, {"eval/accuracy": 0.9})
        checkpoints.save(2, train, numbers(), {})
        checkpoints.add_metrics(2, {"eval/accuracy": 0.5})
        checkpoints.save(3, train, numbers(), {"eval/accuracy": 0.6})
        checkpoints.close()
    assert steps(tmp_path) == [1, 3] and find_step(tmp_path, "eval/accuracy") == (tmp_path, 1)
    kept = json.loads((tmp_path / FOLDER / "1/metrics/metrics").read_text())
    assert kept == {"train/loss": 2.0, "eval/accuracy": 0.9}


def test_arrays_lie_on_the_disk_as_they_are_in_memory(saved):
    workdir, before = saved  # compressing them would take another state of the host's memory
    there = sum(f.stat().st_size for f in (workdir / FOLDER / "5").rglob("*") if f.is_file())
    assert there >= sum(x.nbytes for x in jax.tree.leaves(before))


class ClockIsSet:
    """A data iterator; while it is written the wall clock is set to an hour later."""

    def __init__(self):
        self.now, self.ahead, self.asked = time.time, 0, 0
        self.noticed = threading.Event()  # what waits for the save has looked at the clock

    def time(self):
        self.asked += self.ahead > 0
        if self.asked > 3:
            self.noticed.set()
        return self.now() + self.ahead

    async def save(self, directory):
        async def write():
            await directory.await_creation()
            self.ahead = 3600
            await asyncio.to_thread(self.noticed.wait, 10)

        return write()

    async def load(self, directory):
        """Read nothing."""


def test_a_save_that_takes_an_hour_by_the_clock_is_a_save(tmp_path, monkeypatch):
    data = ClockIsSet()
    with use() as mesh:
        _, train = build(mesh)
        checkpoints = opened(tmp_path)
        monkeypatch.setattr(time, "time", data.time)
        checkpoints.save(5, train, data, {})
        checkpoints.wait()
        checkpoints.close()
    assert data.noticed.is_set() and steps(tmp_path) == [5]


class Waiting:
    """A save that waits for another process."""

    def result(self, seconds):
        raise TimeoutError


@pytest.mark.parametrize(
    "mine, other, says",
    [
        (Waiting(), 2, "not written in process 1 of 2, and the others wait"),
        (OSError(28, "No space left"), 0, "No space left in process 0 of 2, and the"),
        (OSError(28, "No space left"), 2, "No space left in process 0, 1 of 2 (on"),
        (MemoryError(), 2, "the host's memory has no room for the copy that is written in process"),
    ],
)
def test_a_save_that_fails_in_one_process_alone_ends_all(tmp_path, monkeypatch, mine, other, says):
    told = []
    checkpoints = CheckpointManager(tmp_path, CheckpointSettings(), about={}, warn=told.append)
    (checkpoints.directory / "5").mkdir(parents=True)
    checkpoints._saving = (10, 1000, mine)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_PAUSE", 0)
        patch.setattr(distributed.multihost_utils, "process_allgather", lambda x: [x, [other]])
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(checkpoints, "_open", lambda: checkpoints._manager)
        if "wait" in says or "and the" in says:
            with pytest.raises(MMJaxError) as error:
                checkpoints.wait()
            told = [str(error.value)]
            assert "the last good checkpoint is step 5. Mend" in told[0]
        else:
            checkpoints.wait()
    assert len(told) == 1 and f"to {checkpoints.directory}/10: {says}" in told[0]


def test_an_old_step_that_cannot_be_removed_is_no_failed_save(tmp_path, monkeypatch):
    checkpoints = CheckpointManager(tmp_path, CheckpointSettings(), about={})
    monkeypatch.setattr(checkpoint_failures.ORBAX_LOG, "failure", None)
    # As a network disk refuses it while a file in it is open somewhere: Orbax logs that alone.
    storage_backend.LocalStorageBackend().delete_checkpoint(tmp_path / "nothing")
    checkpoints.close()
    assert checkpoint_failures.ORBAX_LOG.failure is None


def test_a_save_without_memory_for_its_copy_is_told_and_training_goes_on(tmp_path, monkeypatch):
    told = []
    checkpoints = CheckpointManager(tmp_path, CheckpointSettings(), about={}, warn=told.append)
    with use() as mesh:
        train = build(mesh)[1]

        def full(*_, **__):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

        with monkeypatch.context() as patch:
            patch.setattr(type(checkpoints._manager), "save_checkpointables_async", full)
            checkpoints.save(5, train, numbers(), {})
        checkpoints.save(10, train, numbers(), {})
        checkpoints.close()
    assert len(told) == 1 and "the host's memory has no room" in told[0], told
    assert steps(tmp_path) == [10]


def test_due_counts_steps_and_saves_none_twice(saved):
    checkpoints = opened(saved[0], every=5)
    assert checkpoints.latest == 5
    assert [step for step in range(1, 16) if checkpoints.due(step)] == [10, 15]
    checkpoints.close()


@pytest.mark.parametrize(
    "shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}]
)
def test_a_checkpoint_is_restored_onto_any_mesh(saved, shape):
    workdir, before = saved
    devices = jax.devices()[: int(np.prod(list(shape.values()) or [1]))]
    with use(make_mesh(shape, devices)) as mesh:
        abstract, _ = build(mesh)
        data, checkpoints = numbers(), opened(workdir)
        got = checkpoints.restore(abstract, data)
        checkpoints.close()
    assert int(got.step) == 5
    assert next(data) == 3  # the very next one
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(before), strict=True)
    next(pairs)  # the step itself, which counts what was saved
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
    for ours, told in zip(jax.tree.leaves(got), jax.tree.leaves(abstract), strict=True):
        assert ours.sharding.is_equivalent_to(told.sharding, ours.ndim)


def test_parameters_alone_are_read_for_evaluation(saved):
    workdir, before = saved
    with use() as mesh:
        abstract, _ = build(mesh)
        got = load_params(workdir, 5, paths.flatten(abstract.params))
    for name, value in paths.flatten(before.params).items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_a_step_that_its_run_removes_meanwhile_is_told_as_that(saved, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    step = workdir / FOLDER / "5"
    with use() as mesh:
        abstract, _ = build(mesh)
        (step / "params/manifest.ocdbt").unlink()
        with pytest.raises(MMJaxError, match="5 of .* cannot be read: files of it are missi") as e:
            load_params(workdir, 5, paths.flatten(abstract.params))
        assert len(str(e.value)) < 500  # Orbax lists all that it can read
        shutil.rmtree(step)
        with pytest.raises(MMJaxError, match=r"5 of .* is gone: .*keep.*or the workdir, o"):
            load_params(workdir, 5, paths.flatten(abstract.params))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"d_mlp": 48}, r"layers\.mlp\.up\.bias is \(2, 64\) there and \(2, 48\) here; "),
        ({"num_layers": 3}, r"bias is \(2, .* there and \(3, .* here; and \d+ more\. "),
        ({"qk_norm": "none"}, r"attn\.\w_norm\.\w+ is trained there and not here; "),
    ],
)
def test_another_config_is_a_clear_error(saved, change, says):
    config = dataclasses.replace(
        tiny.CONFIG, decoder=dataclasses.replace(tiny.CONFIG.decoder, **change)
    )
    with use() as mesh:
        abstract, _ = build(mesh, config)
        checkpoints = opened(saved[0])
        with pytest.raises(MMJaxError, match="does not fit this config") as error:
            checkpoints.restore(abstract, numbers())
        checkpoints.close()
        text = str(error.value)
        assert str(saved[0]) in text and "another --workdir" in text and re.search(says, text)
        assert len(text) < 700  # not the tree of everything there is
        with pytest.raises(MMJaxError, match=f"does not fit the model: .*{says.partition(';')[0]}"):
            load_params(saved[0], 5, paths.flatten(abstract.params))


def test_another_optimizer_is_a_clear_error(saved):
    with use() as mesh:
        abstract, _ = build(mesh)
        lion = optim.make_optimizer(optim.OptimSettings(name="lion"), 10)
        opt = jax.eval_shape(lion.init, abstract.params)
        opt = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), opt)
        checkpoints = opened(saved[0])
        with pytest.raises(MMJaxError, match=r"\.nu.* is of the optimizer there and not here"):
            checkpoints.restore(dataclasses.replace(abstract, opt=opt), numbers())
        checkpoints.close()


class Refusing:
    """A data iterator that was made with other options."""

    async def save(self, directory):
        raise NotImplementedError

    async def load(self, directory):
        async def read():
            raise MMJaxError("shape was [2, 8] and is [4, 8]")

        return read()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of late reads
@pytest.mark.parametrize(
    "file, text",
    [
        ("params/manifest.ocdbt", ""),  # what a host that lost its power leaves of a file
        ("params/_METADATA", "x"),
        ("opt/manifest.ocdbt", None),
        ("data", None),
    ],
)
def test_a_damaged_step_says_from_which_a_run_can_go_on(saved, tmp_path, file, text):
    workdir = tmp_path / "run"
    shutil.copytree(saved[0], workdir)
    for earlier in (None, 3):
        if earlier:
            shutil.copytree(saved[0] / FOLDER / "5", workdir / FOLDER / "3")
        path = workdir / FOLDER / "5" / file
        if text is not None:
            path.write_text(text)
        elif path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        way = "move it out .* goes on from step 3$" if earlier else "another --workdir$"
        with use() as mesh:
            abstract, _ = build(mesh)
            checkpoints = opened(workdir)
            with pytest.raises(MMJaxError, match=f"5 cannot be read: files of it are .*{way}") as e:
                checkpoints.restore(abstract, numbers())
            checkpoints.close()
        assert "incompatible handler" not in str(e.value) and len(str(e.value)) < 600
    del e
    gc.collect()  # what Orbax never awaited, before another test listens


@pytest.mark.parametrize("text", [None, "", '{"item_handlers": {'])
def test_lost_notes_are_told_and_the_rest_is_restored(saved, tmp_path, text):
    workdir, told = tmp_path / "run", []
    shutil.copytree(saved[0], workdir)
    file = workdir / FOLDER / "5" / "_CHECKPOINT_METADATA"
    with use() as mesh:
        abstract, _ = build(mesh)
        for says in (0, 1):
            if says:
                file.unlink() if text is None else file.write_text(text)
            checkpoints = CheckpointManager(
                workdir, CheckpointSettings(), about={}, warn=told.append
            )
            got = checkpoints.restore(abstract, numbers())
            checkpoints.close()
            assert int(got.step) == 5 and checkpoints.notes == {} and len(told) == says
    assert f"{FOLDER}/5: _CHECKPOINT_METADATA is missing or damaged" in told[0]


@pytest.mark.parametrize("text", [b"", b'{"train/loss": 2.', b'\xfb"train/loss": 2.0}'])
def test_damaged_metrics_are_told_with_their_file(saved, tmp_path, text):
    workdir = tmp_path / "run"
    shutil.copytree(saved[0], workdir)
    file = workdir / FOLDER / "5" / "metrics" / "metrics"
    file.write_bytes(text)
    for attempt in (opened, find_step):
        with pytest.raises(MMJaxError, match=f"{file} is damaged .*; remove it: .* never meas"):
            attempt(workdir)
    file.unlink()
    checkpoints = opened(workdir)
    assert checkpoints.latest == 5 and find_step(workdir, "train/loss") == (workdir, 5)
    checkpoints.close()


def test_what_the_data_iterator_says_is_what_is_told(saved):
    with use() as mesh:
        abstract, _ = build(mesh)
        checkpoints = opened(saved[0])
        says = r"does not fit this config: shape was \[2, 8\] and is \[4, 8\]\. Continue with"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with pytest.raises(MMJaxError, match=says):
                checkpoints.restore(abstract, Refusing())
            checkpoints.close()
            gc.collect()  # then Python tells of what was never awaited
    assert not [w for w in told if "never awaited" in str(w.message)]


def test_what_a_killed_save_left_behind_is_ignored(saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved[0], workdir)
    # Orbax writes under another name and renames at the end: this is what a kill -9 leaves.
    half = workdir / FOLDER / "9.orbax-checkpoint-tmp"
    shutil.copytree(workdir / FOLDER / "5", half)
    assert find_step(workdir) == (workdir, 5)
    checkpoints = opened(workdir)
    assert checkpoints.latest == 5
    checkpoints.close()


def test_a_workdir_without_a_checkpoint_says_so(tmp_path):
    checkpoints = opened(tmp_path)
    assert checkpoints.latest is None
    checkpoints.close()
    with pytest.raises(MMJaxError, match="holds no finished checkpoint"):
        find_step(tmp_path)
    with pytest.raises(MMJaxError, match="give a workdir"):
        find_step(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()  # looking for a checkpoint makes no folder
