import ast
import dataclasses
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from mmjax import cli, config, schema
from mmjax.data.multiturn import Multiturn
from mmjax.train.settings import RunSettings
from mmjax.types import MMJaxError


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    schedule: Literal["cosine", "linear"] = "cosine"


@dataclasses.dataclass(frozen=True)
class Checked:
    n: int = 1

    def __post_init__(self):
        if self.n < 1:
            raise MMJaxError(f"n is {self.n}; give 1 or more")


@dataclasses.dataclass(frozen=True)
class Run:
    steps: int
    optim: Optim = Optim()
    mesh: tuple[int, int, int] = (1, 1, 1)
    sizes: tuple[int | None, ...] = (None,)
    stop: int | None = None
    parts: tuple[Optim, ...] = ()
    names: dict[str, float] = dataclasses.field(default_factory=dict)
    free: Any = None
    checked: Checked | None = None


RECIPE = '''"""A recipe."""
from ml_collections import ConfigDict
from mmjax.config import recipe_options

def get_config(arg=None):
    o = recipe_options(arg, quick=False, size=3)
    return ConfigDict(dict(steps=2 if o.quick else 10, size=o.size, name="x", flag=False, stop=None,
                           mesh=(1, 2), data={}, optim=dict(lr=0.1, schedule="cosine")))
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize(
    ("recipe", "folder"),
    [
        ("configs/easyvqa.py", "runs/easyvqa"),
        ("/home/me/own.py:quick", "runs/own-quick"),
        ("own.py:steps=20,path=/data/a b", "runs/own-steps=20,path=_data_a_b"),
    ],
)
def test_a_run_lives_under_its_recipes_name_unless_told_where(recipe, folder):
    assert config.folder_of_runs(recipe) == folder


def test_to_dataclass_follows_nested_types():
    raw = ConfigDict(
        dict(steps=3, optim=dict(lr=1, schedule="linear"), mesh=[2, 2, 1], sizes=(48, None))
    )
    raw.names = ConfigDict(dict(a=1))
    raw.parts = [dict(lr=0.5)]
    made = schema.to_dataclass(Run, raw)
    assert made == Run(
        steps=3,
        optim=Optim(1.0, "linear"),
        mesh=(2, 2, 1),
        sizes=(48, None),
        parts=(Optim(0.5),),
        names={"a": 1.0},
    )
    assert isinstance(made.optim.lr, float)


def test_to_dataclass_names_every_problem_at_once():
    raw = ConfigDict(
        dict(optim=dict(lrr=1e-3, schedule="cosin"), mesh=(1, 2), stop="x", checked=dict(n=0))
    )
    with pytest.raises(MMJaxError) as error:
        schema.to_dataclass(Run, raw)
    lines = str(error.value).split("\n")
    assert len(lines) == 6 and "config.checked: n is 0; give 1 or more" in lines
    assert any("config.optim.lrr; did you mean 'lr'?" in line for line in lines)
    assert any("config.optim.schedule: expected one of 'cosine'" in line for line in lines)
    assert any("config.mesh: expected tuple[int, int, int], 3 values" in line for line in lines)
    assert "config.stop: expected int | None, got str 'x'" in lines
    assert any(line.startswith("config.steps is missing") for line in lines)


def test_one_of_some_names_or_none_is_told_as_such():
    told = "config.data.group: expected one of 'modality' or None, got str 'modalty'; did you mean"
    with pytest.raises(MMJaxError, match=f"{told} 'modality'"):
        schema.to_dataclass(RunSettings, {"data": {"group": "modalty"}})


def test_names_are_text():
    with pytest.raises(MMJaxError, match="a key of config.names: expected a name in quotes, got i"):
        schema.to_dataclass(Run, {"steps": 1, "names": {1: 2.0}})


@pytest.mark.parametrize("steps", [True, 3.0, "3", None])
def test_int_is_strict(steps):
    with pytest.raises(MMJaxError, match=r"config\.steps: expected int, got"):
        schema.to_dataclass(Run, {"steps": steps})


def test_recipe_with_argument_and_overrides(recipe):
    assert config.resolve_recipe(recipe).steps == 10
    made = config.resolve_recipe(
        recipe + ":quick,size=5",
        ["optim.lr=3", "--config.flag", "stop=7", "mesh=(4, 2)", "name=1e5"],
    )
    assert (made.steps, made.size, made.optim.lr, made.flag) == (2, 5, 3.0, True)
    assert (made.stop, made.mesh, made.name) == (7, (4, 2), "1e5")
    assert config.resolve_recipe(recipe, ["size=none"]).size is None


@pytest.mark.parametrize(
    ("suffix", "overrides", "message"),
    [
        (":quik", [], "unknown recipe argument 'quik'; did you mean 'quick'?"),
        (":size=big", [], "expected size=int, got 'big'"),
        ("", ["optim.lrr=1"], "unknown config key 'optim.lrr'; did you mean 'lr'?"),
        ("", ["lr=1"], "unknown config key 'lr'; did you mean 'optim.lr'?"),
        ("", ["data.schedule=1"], "unknown config key 'data.schedule'; did you mean 'optim.sch"),
        ("", ["learning_rate=1"], "key 'learning_rate'; did you mean 'optim.lr'?"),
        ("", ["optim=1"], "config.optim is a group of settings"),
        ("", ["steps.more=1"], "config.steps has no fields"),
        ("", ["steps=many"], "config.steps=many: expected int (now 10), got 'many'"),
        ("", ["steps"], "config.steps is given no value (now 10); write --config.steps=VALUE"),
        ("", ["optim.final"], "unknown config key 'optim.final'"),
    ],
)
def test_recipe_errors_name_the_fix(recipe, suffix, overrides, message):
    with pytest.raises(MMJaxError) as error:
        config.resolve_recipe(recipe + suffix, overrides)
    assert message in str(error.value)


def test_what_the_peers_call_a_setting_is_there():
    made = config.resolve_recipe("configs/fuyu_8b_lora.py")
    assert {config.of_a_peer(name) for name in config._PEERS} <= set(config._settings(made))
    assert config.of_a_peer("lr") is None


def test_missing_recipe_names_the_nearest(recipe):
    with pytest.raises(MMJaxError, match=r"did you mean 'small\.py'"):
        config.resolve_recipe(recipe.replace("small", "smal"))
    with pytest.raises(MMJaxError, match="there is no folder"):
        config.resolve_recipe("nowhere/x.py")


def test_split_overrides_takes_both_spellings():
    overrides, rest = cli.split_overrides(
        ["--config=a.py", "--config.a.b=1", "--workdir", "w", "--config.c", "2", "--config.d"]
    )
    assert overrides == ["a.b=1", "c=2", "d"]
    assert rest == ["--config=a.py", "--workdir", "w"]


def test_the_home_folder_is_written_out_wherever_a_path_is_given(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.with_home("--config.data.sources.train.path=~/a.json") == (
        "--config.data.sources.train.path=/home/me/a.json"
    )
    parser = cli.Parser("it", "Does it.")
    parser.add_argument("given", nargs="+")
    read = parser.read(["path=~/a", "a.pt,~/b.pt"])
    assert read.given == ["path=/home/me/a", "a.pt,/home/me/b.pt"]
    overrides = ["name=~/a,~/b", "data={'path': '~/c', 'names': ('~/d', 'a ~/b', '~')}"]
    made = config.resolve_recipe(recipe, overrides)
    assert made.name == "/home/me/a,/home/me/b"
    assert made.data.path == "/home/me/c" and made.data.names == ("/home/me/d", "a ~/b", "~")
    for kept in ("--workdir", "--config.words=a ~/b", "--workdir=runs/~", "--config.words=~"):
        assert cli.with_home(kept) == kept


@pytest.mark.heavy
def test_a_user_error_is_one_line_and_exit_code_2(recipe, tmp_path):
    shell = tmp_path / "shell.py"
    shell.write_text(
        "from absl import flags\n"
        "from mmjax.cli import run_with_config\n"
        "flags.DEFINE_string('workdir', None, 'where')\n"
        "run_with_config(lambda config: print(config.optim.lr, flags.FLAGS.workdir))\n"
    )

    def run(*args):
        env = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PATH": os.defpath}
        env["HOME"] = "/home/me"
        command = [sys.executable, shell, *args]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return done.returncode, done.stdout, done.stderr

    good = run(f"--config={recipe}:quick", "--config.optim.lr=0.25", "--workdir=here")
    assert good == (0, "0.25 here\n", "")
    # A shell leaves ~ alone behind a sign of equality: taken as it stands, it is a folder's name.
    assert run(f"--config={recipe}:quick", "--workdir=~/here")[1].endswith(" /home/me/here\n")
    code, _, err = run(f"--config={recipe}", "--config.optim.lrr=1")
    assert code == 2 and err.startswith("error: unknown config key 'optim.lrr'; did you mean 'lr'?")
    code, _, err = run(f"--config={recipe}", "--workdirr=1")
    assert code == 2 and "Traceback" not in err and "workdir" in err
    assert "is written --config.workdirr=VALUE" in err  # what people mean by --steps=5
    _, _, err = run(f"--config={recipe}", "--per_device_train_batch_size=4")
    assert "is written --config.data.batch_size=VALUE" in err
    assert run()[0] == 2
    assert "give one with --config=x.py:quick (and" in run("x.py:quick")[2]
    for given in ([f"--config={recipe}"], ["--config", recipe]):
        code, out, _ = run(*given, "--help")
        assert code == 0 and "  --config.optim.lr=0.1" in out and "--workdir: where" in out


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"convert_weights.{x}"
            for x in ["average", "from_run", "inspect", "merge", "to_hf", "to_jax"]
        ),
        *("mmjax.data.emoji", "mmjax.data.mmc4_to_webdataset", "mmjax.data.regroup_parquet"),
        *("mmjax.ask", "mmjax.data.to_array_record", "mmjax.evals.compare"),
    ],
)
def test_help_shows_a_command_as_it_is_typed(name, capsys):
    """On a line of its own, to be copied; argparse runs lines together unless told not to."""
    command = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    lines = [line.strip() for line in said.splitlines()]
    assert any(line.startswith(f"python -m {name}") for line in lines)
    options = said.partition("\noptions:\n")[2]
    bare = re.findall(r"^  (--\S+(?: \S+)?)$\n(?!\s{8})", options, re.M)
    assert not bare, f"without a word of help: {bare}"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.py:quick", "quikstart:quick"])
def test_a_recipe_without_its_folder_is_looked_for_in_configs(name):
    with pytest.raises(MMJaxError, match=r"no recipe .*; did you mean 'configs/quickstart\.py'"):
        config.resolve_recipe(name)


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES", "EIO", "EISDIR"])
def test_trouble_of_the_system_is_told_without_a_traceback(number, capsys):
    def full():
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), "/data/x.tar")

    assert cli.run_guarded(full) == 2
    said = capsys.readouterr().err
    assert said == f"error: /data/x.tar: {os.strerror(getattr(errno, number))}; mend its path, " \
        "rights or disk\n"  # fmt: skip

    def ours():
        raise OSError("a mistake of ours keeps its traceback")

    with pytest.raises(OSError, match="of ours"):
        cli.run_guarded(ours)


def test_memory_that_is_exhausted_is_told_without_a_traceback(capsys):
    def fail(told):
        raise RuntimeError(told)

    full = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBufferAssignment: ..."
    assert cli.run_guarded(lambda: fail(full)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes: this ")
    assert "eval.batch_size" in said and said.count("\n") == 1
    for told in ("a mistake of ours", "RESOURCE_EXHAUSTED: Shared memory size limit exceeded"):
        with pytest.raises(RuntimeError, match=told):
            cli.run_guarded(lambda told=told: fail(told))


def test_a_reader_that_has_gone_is_no_error():
    code = "from mmjax import cli; raise SystemExit(cli.run_guarded(lambda: print('x' * 10**6)))"
    run = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'],
        capture_output=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (141, b"x", b"")


def test_half_a_character_can_be_printed():
    code = "from mmjax import cli; raise SystemExit(cli.run_guarded(lambda: print('a\\ud83d')))"
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert (run.returncode, run.stdout) == (0, b"a\\ud83d\n"), run.stderr.decode()


def test_keyboard_interrupt_is_exit_code_130(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert cli.run_guarded(interrupt) == 130
    assert "stopped" in capsys.readouterr().err


def test_a_keyboard_interrupt_that_a_destructor_swallows_comes_again(capsys):
    """As one does that falls into a callback of the garbage collector, which JAX has."""
    hook, swallowed = sys.unraisablehook, []

    class Dies:
        def __del__(self):
            swallowed.append(True)
            raise KeyboardInterrupt if len(swallowed) < 3 else ValueError("another fault")

    def work():
        Dies()
        try:
            threading.Event().wait(5)
        except KeyboardInterrupt:
            Dies()  # and once more
            threading.Event().wait(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    try:
        assert cli.run_guarded(work) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in capsys.readouterr().err and len(swallowed) == 2
    told = []
    sys.unraisablehook = told.append
    try:
        assert cli.run_guarded(lambda: Dies() and None) == 0
        assert [one.exc_type for one in told] == [ValueError]  # goes where it went
        assert sys.unraisablehook == told.append
    finally:
        sys.unraisablehook = hook


def test_a_value_inside_a_list_of_groups_can_be_overridden():
    recipe = "configs/quickstart.py:quick"
    made = config.resolve_recipe(recipe, ["eval.tasks.1.limit=7", "eval.tasks.0.name=x"])
    assert (made.eval.tasks[1]["limit"], made.eval.tasks[0]["name"]) == (7, "x")
    with pytest.raises(MMJaxError, match=r"give the whole of it, --config\.data\.resolutions="):
        config.resolve_recipe(recipe, ["data.resolutions.0=48"])


def settings(recipe, *overrides):
    return schema.to_dataclass(RunSettings, config.resolve_recipe(f"configs/{recipe}", overrides))


def test_a_group_of_names_of_the_users_own_can_be_added_to():
    made = settings(
        "fuyu_8b.py", "mesh.fsdp=8", "mesh.context=4", "model.processor.max_height=1440",
        "model.processor.max_width=None", "data.sources.train.image_root=/pictures",
        "data.sources.more={'kind': 'json', 'path': '/b.json'}", "data.sources.more.draws=7",
    )  # fmt: skip
    assert made.mesh == {"fsdp": 8, "context": 4}
    assert made.model.processor == {"max_height": 1440, "max_width": None}
    assert made.data.sources["train"]["image_root"] == "/pictures"
    assert made.data.sources["more"] == {"kind": "json", "path": "/b.json", "draws": 7}
    (task, _) = settings("quickstart.py", "eval.tasks.0.prompt={question}!").eval.tasks
    assert task["prompt"] == "{question}!"
    for wrong in ("optim.lrr=1", "model.procesor.max_height=1", "data.sources.trian.path=x"):
        with pytest.raises(MMJaxError, match="unknown config key"):
            settings("fuyu_8b.py", wrong)
    with pytest.raises(MMJaxError, match="did you mean 'hidden_size'"):
        settings("quickstart.py", "model.config.hidden_sise=64")
    assert settings("fuyu_8b.py", "data.sources.train2={}").data.sources["train2"] == {}


def test_a_recipe_may_give_such_a_group_anew_as_a_plain_dict():
    made = config.resolve_recipe("configs/bunny_cpu.py:quick")
    with made.unlocked():
        made.model.config = {"image_aspect_ratio": "pad"}
        made.mesh = {"fsdp": 2}
    config.apply_overrides(made, ["model.config.width=64", "mesh.data=4"])
    assert made.model.config.to_dict() == {"image_aspect_ratio": "pad", "width": 64}
    assert made.mesh.to_dict() == {"fsdp": 2, "data": 4}


def test_a_setting_of_several_kinds_can_change_its_kind():
    sides = {"min": 224, "max": 1024, "multiple": 32}
    made = settings("otterhd_8b.py", f"data.resolutions={sides}", "data.template={'a': 'plain'}")
    assert (made.data.resolutions, made.data.template) == (sides, {"a": "plain"})
    made = settings("otterhd_8b.py", "data.augment={'a': ('flip',)}")
    assert made.data.augment == {"a": ("flip",)}
    clever = "clever_flamingo_9b.py"  # which has a multiturn: it can be replaced, and left out
    assert settings(clever, "data.multiturn={'turns': 3}").data.multiturn == Multiturn(3)
    assert settings(clever, "data.multiturn.turns=3").data.multiturn == Multiturn(3, 16, 2048)
    assert settings(clever, "data.multiturn=None").data.multiturn is None
    for wrong in ("data.multiturn.turn=3", "data.multiturn={'turn': 3}"):
        with pytest.raises(MMJaxError, match="unknown config key .*did you mean 'turns'"):
            settings(clever, wrong)
    with pytest.raises(MMJaxError, match="config.optim is a group of settings .* set one of them"):
        settings(clever, "optim={'lr': 1e-3}")
    magnifier = settings("magnifier_resolution.py", "data.resolutions=(48, None)")
    assert magnifier.data.resolutions == (48, None)
    assert settings("openflamingo_3b.py", "data.weights=sqrt").data.weights == "sqrt"
    with pytest.raises(MMJaxError, match=r"config\.data\.seq_len: expected int, got dict {'a': 1}"):
        settings("fuyu_8b.py", "data.seq_len={'a': 1}")
    with pytest.raises(MMJaxError, match=r"config\.mesh: expected dict\[str, int\], got int 8"):
        settings("fuyu_8b.py", "mesh=8")


def test_a_recipe_can_change_the_kind_of_such_a_setting_too():
    made = config.resolve_recipe("configs/otterhd_8b.py")
    with made.unlocked():
        made.data.template = {"a": "plain"}
        made.data.resolutions = {"min": 224, "max": 1024}
        made.data.augment = {"a": ("flip",)}
    config.apply_overrides(made, ["data.template.b=simple_chat", "data.resolutions.multiple=32"])
    data = schema.to_dataclass(RunSettings, made).data
    assert data.template == {"a": "plain", "b": "simple_chat"} and data.augment == {"a": ("flip",)}
    assert data.resolutions == {"min": 224, "max": 1024, "multiple": 32}
    with made.unlocked():
        made.data.resolutions, made.data.template, made.data.seq_len = (448,), "plain", {"a": 1}
    with pytest.raises(MMJaxError, match=r"config\.data\.seq_len: expected int, got dict {'a': 1}"):
        schema.to_dataclass(RunSettings, made)
    made.data.seq_len = 128
    data = schema.to_dataclass(RunSettings, made).data
    assert (data.resolutions, data.template, data.seq_len) == ((448,), "plain", 128)


def test_what_a_recipe_sets_wrongly_is_told_by_its_name(tmp_path):
    file = tmp_path / "mine.py"
    for line, told in (
        ("config.steps = 'many'", "config.steps: expected int, got str 'many'"),
        ("config.steps = 1e4", "config.steps: expected int, got float 10000.0"),
        ("config.lora.targets = 'attn.*'", "config.lora.targets: expected tuple[str, ...], got"),
        ("config.optim.lrr = 1", "unknown config key config.optim.lrr; did you mean 'lr'?"),
        (
            "config.optm.lr = 1e-4",
            "mine.py:6: config.optm.lr = 1e-4: there is no setting 'optm'; did you mean 'optim'? "
            "(there are accumulate, bad_steps,",
        ),
        (
            "config = None",
            "mine.py: get_config returns NoneType, no ConfigDict: it ends with return config",
        ),
    ):
        file.write_text(
            "from configs import fuyu_8b_lora\n\n\ndef get_config(arg=None):\n"
            f"    config = fuyu_8b_lora.get_config(arg)\n    {line}\n    return config\n"
        )
        with pytest.raises(MMJaxError) as error:
            schema.to_dataclass(RunSettings, config.resolve_recipe(file))
        assert told in str(error.value)


def written_commands():
    """Every command with a recipe and overrides that a page or a recipe's docstring tells."""
    for file in (Path("README.md"), *Path("docs").glob("*.md"), *Path("configs").glob("[!_]*.py")):
        text = re.sub(r"\\+\n", " ", file.read_text())
        for line in re.findall(r"--config=configs/.*", text):
            words = re.findall(r"--config(?:\.[\w.]+)?=(?:'[^']*'|[^\s`]+)", line)
            recipe, *overrides = [word.replace("'", "") for word in words]
            if overrides and not re.search(r"[<$]", recipe):
                yield pytest.param(
                    recipe.removeprefix("--config=configs/"), overrides, id=f"{file.name} {recipe}"
                )


def test_the_recipe_that_a_page_writes_resolves(tmp_path):
    page = Path("docs/training.md").read_text()
    (told,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(told)
    made = config.resolve_recipe(tmp_path / "mine.py", ["data.sources.receipts.draws=3"])
    run = schema.to_dataclass(RunSettings, made)
    assert run.name == "fuyu_8b_lora" and run.lora.rank == 64
    assert set(run.data.sources) == {"receipts", "charts"} == set(run.data.weights)
    assert run.data.sources["receipts"]["draws"] == 3 and run.data.resolutions == (448, 768, None)
    assert [task["name"] for task in run.eval.tasks] == ["receipts"] and run.eval.every == 500


def test_pages_and_recipes_tell_commands():
    assert len(list(written_commands())) > 20


@pytest.mark.parametrize("recipe, overrides", list(written_commands()))
def test_commands_of_the_pages_name_settings_that_are_there(recipe, overrides):
    made = config.resolve_recipe(f"configs/{recipe}", overrides)
    schema.to_dataclass(RunSettings, made)  # tells a value of a wrong kind
    for override in overrides:
        name, _, text = override.removeprefix("--config.").partition("=")
        found = made
        for part in name.split("."):
            found = found[int(part)] if part.isdigit() else found[part]
        found = found.to_dict() if isinstance(found, ConfigDict) else found
        assert found == text or found == ast.literal_eval(text)


def test_a_flag_of_a_command_that_is_misspelt_is_told_with_the_nearest(capsys):
    parser = cli.Parser("it", "Does it.")
    parser.add_argument("given", nargs="*")
    parser.add_argument("--vision-config")
    parser.add_argument("--overwrite", action="store_true")
    for flag, near in (
        ("--overwite", "; did you mean '--overwrite'?"),
        ("--vision_config=x", "; did you mean '--vision-config'?"),
        ("--zzz", "\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            parser.read(["a", flag])
        assert ended.value.code == 2
        assert f"it: error: unrecognized arguments: {flag}{near}" in capsys.readouterr().err
    assert parser.read(["a", "--overwrite"]).overwrite
