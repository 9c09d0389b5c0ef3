"""What an evaluation would stumble on after days is told before a run begins."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from flax import nnx
from tiny_language_tokenizers import build_neox_tokenizer

from mmjax.checkpoint import CheckpointSettings
from mmjax.loaded import LoadedModel
from mmjax.models.bunny.processor import BunnyProcessor
from mmjax.models.fuyu.processor import FuyuProcessor
from mmjax.train import evaluation, loop, tasks
from mmjax.train.settings import (
    DataSettings,
    EvalSettings,
    LoRASettings,
    ModelSettings,
    RunSettings,
)
from mmjax.train.workdir import as_trained, write_config
from mmjax.types import BadSample, Message, MMJaxError, Record

GOOD = [Record((Message("user", "what?"), Message("assistant", "red")), (), {})]
UNTOLD = [Record((Message("user", "what?"),), (), {})] * 2
CAPTIONS = [Record((Message("assistant", "red"),), (), {})]


class Unreadable(list):
    def __getitem__(self, i):
        raise BadSample("corrupt_image", "x.png is cut off")


def settings(best=None, saves=5, task=(), **changes):
    tasks = ({"name": "vqa", "source": GOOD, **dict(task)},)
    return RunSettings(
        eval=EvalSettings(**{"tasks": tasks, "every": 10} | changes),
        checkpoint=CheckpointSettings(every=saves, best=best),
    )


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(task={"source": []}), "task vqa: its source holds no records"),
        (dict(task={"demos": [], "shots": 1}), "task vqa: its demos holds no records"),
        (dict(task={"source": {"kind": "json", "path": "/no/x.json"}}), "/no/x.json"),
        (dict(task={"source": [Record((Message("user", "what?"),), (), {})]}), "has no answers"),
        (dict(task={"scorer": "vqa_accuracy"}), "vqa_accuracy needs several human answers"),
        (dict(task={"demos": GOOD, "shots": 1}), "1 shots need more than the 1 records"),
        (dict(task={"demos": UNTOLD, "shots": 1}), "0 of 2 records can be shown"),
        (dict(task={"source": CAPTIONS, "prompt": "{question}!"}), "no question for the prompt"),
        (dict(template="fuyu_promt"), "'fuyu_promt'; did you mean 'fuyu_prompt'"),
        (
            dict(task={"rank": "likelihood"}),
            r"the options \[\], and rank 'likelihood' needs two",
        ),
        (
            dict(task={"rank": "likelihood", "options": ("a", "b")}, template="plain"),
            "template 'plain' does not say how an answer stands behind it; ask with one of fuyu",
        ),
        (dict(batch_size=0), "config.eval.batch_size is 0; it must be at least 1"),
        (dict(num_beams=65), "num_beams is 65, more than the vocabulary of 64"),
        (dict(best="eval/vqa/acuracy"), "'eval/vqa/acuracy'.*mean 'eval/vqa/accuracy'.*there are"),
        (dict(best="eval/vqa/loss"), "no evaluation reports an accuracy of this name"),
        (dict(best="eval/vqa/accuracy", saves=4), "every is 10 and .*every 4.*such as 8"),
        (dict(best="eval/vqa/accuracy", every=0), "eval.every is 0"),
    ],
)
def test_mistakes_of_evaluation_are_told_at_the_start(given, says):
    with pytest.raises(MMJaxError, match=says):
        tasks.check(settings(**given), vocabulary=64)


def test_two_tasks_of_one_name_are_told_at_the_start():
    one = settings()
    twice = dataclasses.replace(one.eval, tasks=one.eval.tasks * 2)
    with pytest.raises(MMJaxError, match="tasks need different names.* got vqa, vqa"):
        tasks.check(dataclasses.replace(one, eval=twice))


@pytest.mark.parametrize("template", ["fuyu_prompt", "bunny_minicpm_prompt"])
def test_a_template_of_other_tokens_is_told_at_the_start(template):
    """A dialogue's earlier answers end with a token, too: else the evaluation fails at its end."""
    processor = BunnyProcessor(tokenizer=build_neox_tokenizer())
    tasks.check(settings(template="bunny_prompt"), processor)
    with pytest.raises(MMJaxError, match=f"template {template!r}: "):
        tasks.check(settings(template=template), processor)


@pytest.mark.parametrize(
    "task, workdir, says",
    [
        ({"source": {"kind": "json", "path": "/no/x.json"}}, "out", "/no/x.json"),
        ({}, "file", "file cannot be written: File exists; give another --workdir"),
        ({}, "file/out", "out cannot be written: Not a directory; give another --workdir"),
        ({}, "/proc/out", "out cannot be written: No such file.*; give another --workdir"),
        ({}, None, "model is a model folder; give --workdir for results"),
    ],
)
def test_eval_tells_mistakes_before_it_opens_the_model(task, workdir, says, tmp_path, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(evaluation, "open_model", opened)
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    given = workdir and str(tmp_path / workdir)
    with pytest.raises(MMJaxError, match=says):
        evaluation.run_eval(settings(task=task), str(tmp_path / "model"), given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]


def test_a_model_folder_is_asked_on_the_mesh_and_with_the_processors_settings(
    tmp_path, monkeypatch
):
    given = RunSettings(
        model=ModelSettings(processor={"frames": 16}), mesh={"tensor": 2, "fsdp": -1}
    )
    held = SimpleNamespace(family=SimpleNamespace(name="fuyu"))
    monkeypatch.setattr(evaluation.opening, "open_pretrained", lambda path: held)
    monkeypatch.setattr(evaluation, "load", lambda path, **options: (path, options))
    ((path, options), step) = evaluation.open_model(tmp_path, given, weights="int8")
    mesh = options.pop("mesh")
    assert (mesh.shape["tensor"], mesh.size) == (2, jax.device_count())
    assert options == {"weights": "int8", "processor": {"frames": 16}, "progress": True}
    assert path == tmp_path and step is None
    held.family.name = "flamingo"
    with pytest.raises(
        MMJaxError, match="holds a flamingo model, and --config is a recipe of fuyu"
    ):
        evaluation.open_model(tmp_path, given)
    with pytest.raises(MMJaxError, match="give a recipe of flamingo"):  # whatever it sets
        evaluation.open_model(tmp_path, dataclasses.replace(given, model=ModelSettings()))


def test_a_run_is_evaluated_as_it_was_trained_whatever_the_recipe_says(tmp_path):
    """Else overrides that are not repeated would change what is asked, or end in a placeholder."""
    (tmp_path / "base").mkdir()
    base = str(tmp_path / "base")
    trained = RunSettings(
        model=ModelSettings(
            init=base, processor={"max_height": 300, "image_mean": (0.5,) * 3}, attention="mosaic"
        ),
        data=DataSettings(sources={"a": {"kind": "sums"}}, resolutions=(48, None)),
        lora=LoRASettings(rank=4),
        checkpoint=CheckpointSettings(best="eval/x/accuracy"),
    )
    write_config(trained, tmp_path)
    recipe = settings()
    recipe = dataclasses.replace(recipe, mesh={"fsdp": 1}, model=ModelSettings(init="set it"))
    got = as_trained(recipe, tmp_path)
    assert (got.model.init, got.model.processor["max_height"], got.lora) == (
        base,
        300,
        trained.lora,
    )
    assert (got.model.attention, got.mesh, got.eval) == ("auto", {"fsdp": 1}, recipe.eval)
    assert (got.checkpoint.best, got.data.resolutions) == ("eval/x/accuracy", (48, None))
    # A recipe of another family would ask in a template that the model has never seen.
    other = dataclasses.replace(recipe, model=ModelSettings(family="bunny"))
    with pytest.raises(MMJaxError, match="holds a fuyu model, and --config is a recipe of bunny"):
        as_trained(other, tmp_path)
    # Its base has moved: the recipe says where to, or is told to.
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(MMJaxError, match=r"model\.init .*base.* --config\.model\.init=\.\.\., or"):
        as_trained(recipe, tmp_path)
    recipe = dataclasses.replace(recipe, model=ModelSettings(init=str(tmp_path / "moved")))
    assert as_trained(recipe, tmp_path).model == dataclasses.replace(
        got.model, init=str(tmp_path / "moved")
    )
    assert as_trained(recipe, tmp_path / "moved") is recipe  # no config.json


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    for path in ("nowhere", "run/checkpoints/7"):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        with pytest.raises(MMJaxError, match=f"{path} does not exist; give a workdir"):
            evaluation.run_eval(settings(), str(tmp_path / path), str(tmp_path / "out"))


def test_the_folder_of_checkpoints_is_no_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for workdir in (None, str(tmp_path / "out")):
        with pytest.raises(MMJaxError, match=f"give the run, {tmp_path}, or one of them, .*/STEP"):
            evaluation.run_eval(settings(), str(tmp_path / "checkpoints"), workdir)


def test_results_that_cannot_be_written_are_told(tmp_path, monkeypatch):
    (tmp_path / "results.json").mkdir()  # as good as a full disk
    monkeypatch.setattr(evaluation, "_answerer", lambda *_: lambda records, *_: ["red"])
    model = LoadedModel("", None, nnx.Dict({}), None, None)
    with pytest.raises(MMJaxError, match="results of vqa .*: Is a directory; make room"):
        evaluation.full(model, settings(), tmp_path, step=None,
                        checkpoint_name="x")  # fmt: skip


def test_results_that_nothing_can_be_added_to_are_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for module, name in ((evaluation, "open_model"), (loop, "make_design")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it was told too late"))
    (tmp_path / "results.json").write_text('{"vqa": {')
    says = r"results\.json is no JSON .*; move it away and evaluate again"
    with pytest.raises(MMJaxError, match=says):
        evaluation.run_eval(settings(), str(tmp_path / "model"), str(tmp_path))
    with pytest.raises(MMJaxError, match=says):
        loop.run(settings(), tmp_path)


def test_a_resolution_that_the_processor_never_shows_is_told_at_the_start(tmp_path, monkeypatch):
    """Fuyu-8B's box would shrink the pictures again, and the report would name the larger size."""
    model = LoadedModel("", None, nnx.Dict({}), FuyuProcessor(), None)
    monkeypatch.setattr(evaluation, "open_model", lambda *_, **__: (model, None))
    (tmp_path / "model").mkdir()
    given = settings(task={"resolutions": (None, 1080, 1440)})
    with pytest.raises(MMJaxError, match="resolution 1440: .* 1080 x 1920 pixels"):
        tasks.check(given, model.processor)
    with pytest.raises(MMJaxError, match="resolution 1440: .* 1080 x 1920 pixels"):
        evaluation.run_eval(given, str(tmp_path / "model"), str(tmp_path))
    tasks.check(given, model.processor.with_options(max_height=None))


def test_a_model_asked_in_other_words_than_its_runs_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "full", lambda *_, **__: {})
    (tmp_path / "model").mkdir()
    for noted in (None, "fuyu_prompt", "fuyu_spaced_prompt"):
        model = LoadedModel("", None, nnx.Dict({}), FuyuProcessor(), None, template=noted)
        monkeypatch.setattr(evaluation, "open_model", lambda *_, model=model, **__: (model, None))
        evaluation.run_eval(settings(), str(tmp_path / "model"), str(tmp_path / "out"))
        told = capsys.readouterr().err
        assert ("asked it in fuyu_spaced_prompt, and this recipe asks in fuyu_prompt" in told) == (
            noted == "fuyu_spaced_prompt"
        )
        assert bool(told) == (noted == "fuyu_spaced_prompt")


def trained(by, **changes):
    return RunSettings(data=DataSettings(template=by), eval=EvalSettings(**changes))


@pytest.mark.parametrize(
    "template, asked",
    [
        ("fuyu_chat", "fuyu_prompt"),
        ("otter_tight_chat", "otter_tight_prompt"),
        ("guanaco_no_prompt_chat", "guanaco_no_prompt_prompt"),
        ("bunny_plain", "bunny_plain_prompt"),
        ({"a": "otter_chat", "b": "otter_chat"}, "otter_prompt"),
    ],
)
def test_tasks_are_asked_as_the_model_is_trained(template, asked):
    assert tasks.template_of(trained(template)) == asked
    assert tasks.template_of(trained(template, template="plain")) == "plain"


@pytest.mark.parametrize(
    "template, says",
    [
        ("interleaved", "data.template is interleaved, .* set eval.template to one of fuyu_prompt"),
        ({"a": "otter_chat", "b": "fuyu_chat"}, "is otter_chat and fuyu_chat, .* set eval"),
        ("otter_caht", "'otter_caht'; did you mean 'otter_chat'"),
    ],
)
def test_a_template_that_does_not_tell_how_to_ask(template, says):
    with pytest.raises(MMJaxError, match=says):
        tasks.template_of(trained(template))


def test_what_can_be_evaluated_is_let_through():
    sweep = {"resolutions": (None, 48)}
    tasks.check(settings(best="eval/vqa/accuracy_48", task=sweep))
    tasks.check(settings(task={"source": Unreadable([1, 2])}))
    never = EvalSettings(tasks=({"name": "vqa", "source": []},), final=False)
    tasks.check(dataclasses.replace(settings(), eval=never))
