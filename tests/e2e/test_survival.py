"""Real processes, real signals: a run that is killed loses nothing but the steps since its save."""

import random
import shutil
import signal

import pytest

from mmjax.config import resolve_recipe
from mmjax.schema import to_dataclass
from mmjax.train.loop import run
from mmjax.train.settings import RunSettings
from mmjax.types import MMJaxError
from tests.e2e import faults

RECIPE = faults.Recipe(steps=40)
SEED = 7  # of a kill within a save


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("survival") / "undisturbed"
    startup = faults.run_undisturbed(RECIPE, workdir)
    return workdir, startup


def test_a_killed_run_loses_nothing_and_equals_an_undisturbed_one_bit_for_bit(
    undisturbed, tmp_path
):
    reference, startup = undisturbed
    kills = []

    def report(moment, number, workdir, lost):
        kills.append((moment, number, lost <= 2 * RECIPE.every))

    faults.run_with_kills(RECIPE, tmp_path / "run", 1, random.Random(SEED), startup, report)
    faults.assert_equal_runs(tmp_path / "run", reference)
    assert kills == [("save", signal.SIGKILL, True)]


@pytest.mark.heavy
def test_sigterm_saves_and_exits_0_and_a_restart_goes_on(undisturbed, tmp_path):
    reference, _ = undisturbed
    workdir = tmp_path / "run"
    process = RECIPE.start(workdir)
    assert faults.wait_for(lambda: faults.last_step(workdir) >= 7, process)
    process.send_signal(signal.SIGTERM)
    code, out = faults.finish(process, workdir)
    stood = faults.saved_steps(workdir)[-1]
    assert code == 0 and f"SIGTERM: saved step {stood}; start again to continue" in out, out
    assert stood == faults.last_step(workdir) < RECIPE.steps
    code, out = faults.finish(RECIPE.start(workdir), workdir)
    assert code == 0 and f"continuing at step {stood}" in out, out
    faults.assert_equal_runs(workdir, reference)


@pytest.mark.heavy
def test_an_evaluation_that_a_signal_leaves_unfinished_is_told(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    before = faults.logged(workdir)
    task = {"name": "long", "source": {"kind": "sums", "split": "test", "size": 10**6}}
    process = RECIPE.start(workdir, "eval.final=True", f"eval.tasks={[task]}")
    assert faults.wait_for(lambda: "long  " in faults.log_text(workdir), process)
    process.send_signal(signal.SIGTERM)
    code, out = faults.finish(process, workdir)
    assert code == 0 and "SIGTERM: the evaluation is not finished; start again" in out, out
    assert faults.logged(workdir) == before


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
