"""Every recipe, shrunk: trained, saved, continued, evaluated, exported, loaded, given to torch."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import FuyuForCausalLM

import mmjax
from convert_weights import to_hf
from mmjax.config import resolve_recipe
from mmjax.data.catalog import make_source, make_sources
from mmjax.data.check import check
from mmjax.data.resizing import list_resolutions
from mmjax.models.bunny.config import BunnyConfig
from mmjax.parallel.mesh import make_mesh
from mmjax.schema import to_dataclass
from mmjax.train import build, evaluation, loop, tasks
from mmjax.train.optim import decays
from mmjax.train.settings import (
    CheckpointSettings,
    LogSettings,
    LoRASettings,
    RunSettings,
    check_numbers,
)
from mmjax.types import MMJaxError
from tests.data import emoji_files
from tests.evals import mmmu_files

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name[0] != "_")
# Recipes whose toy is another's but for its name, its sizes and what only a full-size run has.
SAME_TOY = {
    "otterhd_512": "otterhd_8b",
    "otterhd_1024": "otterhd_8b",
    "openflamingo_4b": "openflamingo_3b",
    "openflamingo_9b": "openflamingo_3b",
    "otter_video": "otter_9b",
    "clever_flamingo_lora": "clever_flamingo_9b",
    "bunny_phi1_5_siglip": "bunny_phi2_siglip",
    "bunny_phi1_5_eva": "bunny_phi2_siglip",
    "bunny_phi2_eva": "bunny_phi2_siglip",
    "bunny_stablelm2_siglip": "bunny_phi2_siglip",
    "bunny_stablelm2_eva": "bunny_phi2_siglip",
}
# One of each family, and one of its adapters, is continued, exported, and answers from there;
# Flamingo has three kinds of data.
EXPORTED = {"quickstart", "otterhd_8b_lora", "captions_cpu", "otter_9b", "clever_flamingo_9b",
            "bunny_cpu"}  # fmt: skip
# One of each family is asked about several pictures.
FAMILIES = {"quickstart", "otter_9b", "bunny_cpu"}
# Those whose way another goes too, or its own tests: Fuyus as quickstart, adapters (test_adapters),
# documents, captions and Clever Flamingo's instructions as Otter's, which trains as
# test_partly_trained does, Bunnies (test_bunny_stages).
SIBLINGS = {"easyvqa", "magnifier_resolution", "fuyu_8b", "otterhd_8b", "fuyu_text_only",
            "fuyu_8b_lora", "otterhd_8b_lora", "otter_9b", "openflamingo_3b", "captions_cpu",
            "clever_flamingo_9b", "bunny_cpu", "bunny_phi2_siglip",
            "bunny_llama3_8b_s2"}  # fmt: skip
# Learning rate of the first stage, width and layers of the language model, tokens of an image.
BUNNIES = {
    "bunny_phi1_5_siglip": (5e-4, 2048, 24, 729),
    "bunny_phi1_5_eva": (1e-3, 2048, 24, 576),
    "bunny_phi2_siglip": (5e-4, 2560, 32, 729),
    "bunny_phi2_eva": (5e-5, 2560, 32, 576),
    "bunny_stablelm2_siglip": (5e-4, 2048, 24, 729),
    "bunny_stablelm2_eva": (1e-3, 2048, 24, 576),
    "bunny_llama3_8b_s2": (1e-3, 4096, 32, 729),
}
# How tasks are asked, unless the user says otherwise; each as its recipe trains.
ASKED = {
    "otter": "otter_prompt",
    "clever": "guanaco_no_prompt_prompt",
    "openflamingo": "open_flamingo_caption_prompt",
    "otterhd": "fuyu_prompt",
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs take every device there is; here one, which compiles soonest."""
    for module in (loop, evaluation):
        monkeypatch.setattr(module, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))


def small(file):
    """The settings of ``:quick``, shrunk further: two steps, a few questions."""
    settings = to_dataclass(RunSettings, resolve_recipe(f"{file}:quick"))
    tasks = [{**t, "limit": 2, "resolutions": (None,)} for t in settings.eval.tasks[:1]]
    return dataclasses.replace(
        settings,
        steps=2,
        data=dataclasses.replace(settings.data, workers=0),
        checkpoint=CheckpointSettings(every=2, keep=2),
        log=LogSettings(every=1),
        eval=dataclasses.replace(settings.eval, tasks=tuple(tasks), every=0, final=False),
    )


def several_pictures(folder):
    """A task of questions about three pictures, between the text and in front of it."""
    path = mmmu_files.save(folder / "MMMU", "Art", [
        mmmu_files.question("validation_Art_1", "what is it? <image 1>",
                            ["<image 2>", "<image 3>"], "B", pictures=3),
        mmmu_files.question("validation_Art_2", "what is it?", [], "red", pictures=3),
    ])  # fmt: skip
    return {"benchmark": "mmmu", "path": path, "max_new_tokens": 2}


def logged(workdir):
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def greedy(model, example, loaded, count):
    """Torch's greedy tokens, one whole forward pass for each."""
    ids, new = example["tokens"].tolist(), []
    patches = torch.from_numpy(loaded.processor.config.normalise(example["patches"]))
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), pixel_values=patches).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == loaded.config.eos_token_id:
            break
    return new


@pytest.fixture(autouse=True)
def emoji(monkeypatch, tmp_path):
    """What `python -m mmjax.data.emoji` fetches, in miniature."""
    monkeypatch.setenv("MMJAX_EMOJI", str(emoji_files.write(tmp_path / "emoji")))


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_resolves_at_its_full_size(file):
    settings = to_dataclass(RunSettings, resolve_recipe(file))
    check_numbers(settings)
    asked = tasks.template_of(settings)
    assert asked == ASKED.get(file.stem.split("_")[0], asked)
    assert settings.name == file.stem
    assert f"configs/{file.name}" in file.read_text().split('"""')[1]  # its command
    for name, spec in settings.data.sources.items():
        try:
            make_sources({name: spec})
        except MMJaxError as error:  # its files are not here; its arguments are known
            assert "argument" not in str(error)


@pytest.mark.parametrize("name", ["otter_9b", "otter_video", "clever_flamingo_lora",
                                  "clever_flamingo_9b", "openflamingo_3b"])  # fmt: skip
def test_weight_decay_of_flamingos_is_for_gated_blocks_alone(name):
    """As the peers group their parameters; Otter leaves gates, biases and what it names a norm."""
    found = to_dataclass(RunSettings, resolve_recipe(ROOT / f"configs/{name}.py")).optim
    names = {
        "cross.attn.q.kernel": True,
        "cross.attn_gate": not name.startswith("otter"),
        "cross.attn_norm.scale": not name.startswith("otter"),
        "cross.mlp_norm.scale": True,
        "cross.mlp_norm.bias": not name.startswith("otter"),
        "perceiver.layers.mlp.up.kernel": False,
        "decoder.layers.attn.q.lora_a": False,
    }
    assert found.weight_decay == 0.1
    assert {one: decays(one, found.decay) for one in names} == names


@pytest.mark.parametrize("name", BUNNIES)
def test_every_stage_of_a_bunny_is_as_published(name):
    def stage(arg):
        settings = to_dataclass(RunSettings, resolve_recipe(f"{ROOT}/configs/{name}.py:{arg}"))
        check_numbers(settings)
        return settings

    lr, *sizes = BUNNIES[name]
    first, full, lora, tower = map(stage, ("pretrain", "finetune", "lora", "lora,tower"))
    model = BunnyConfig.from_hf(first.model.plan_config | first.model.config)
    assert [model.decoder.d_model, model.decoder.num_layers, model.image_tokens] == sizes
    assert model.s2_scales == ((384, 768, 1152) if name.endswith("s2") else None)
    assert (first.optim.lr, first.train, first.data.batch_size) == (lr, ("projector.*",), 256)
    assert (full.optim.lr, full.train) == (2e-5, ("decoder.*", "projector.*"))
    peak, rank = (1e-4, 256) if name.endswith("s2") else (2e-4, 128)
    assert (lora.optim.lr, lora.train, lora.lora.rank) == (peak, ("projector.*",), rank)
    assert {one.params: one.lr for one in tower.optim.rates} == pytest.approx(
        {"projector.*": peak / 10, "vision.*": peak / 10}
    )
    for one in (full, lora, tower):
        assert one.data.batch_size == 128
        # The peer cuts at so many tokens, however many of them are answers, and drops nothing.
        assert one.data.too_long == "truncate" and one.data.max_targets == one.data.seq_len
        assert one.model.config["image_aspect_ratio"] == "pad"
        assert one.model.config["tokenizer_model_max_length"] == one.data.seq_len
    with pytest.raises(MMJaxError, match=f"{name} takes one of pretrain, finetune, lora"):
        stage("pretrain,lora")


@pytest.mark.parametrize(
    "arg, resolutions",
    [("low", (48,)), ("high,quick", (80,)), ("dynamic", {"min": 48, "max": 80, "multiple": 16})],
)
def test_the_magnifier_is_asked_at_a_size_above_all_of_training(arg, resolutions):
    recipe = resolve_recipe(f"{ROOT}/configs/magnifier_resolution.py:{arg}")
    settings = to_dataclass(RunSettings, recipe)
    assert settings.data.resolutions == resolutions
    sizes = settings.eval.tasks[0]["resolutions"]
    assert len(sizes) == 4 and max(sizes) > max(list_resolutions(resolutions))
    with pytest.raises(MMJaxError, match="takes one of low, high, dynamic"):
        resolve_recipe(f"{ROOT}/configs/magnifier_resolution.py:low,high")


def test_resolutions_can_be_set_from_the_command_line():
    def given(recipe, override):
        recipe = resolve_recipe(f"{ROOT}/configs/{recipe}.py", [override])
        return to_dataclass(RunSettings, recipe).data.resolutions

    assert given("otterhd_8b", "data.resolutions=(448,512,768)") == (448, 512, 768)
    assert given("magnifier_resolution", "data.resolutions.max=40")["max"] == 40
    assert given("fuyu_8b", "data.resolutions={'min': 8, 'max': 9}") == {"min": 8, "max": 9}


@pytest.mark.parametrize("arg", ["pretrain", "lora"])
def test_the_toy_of_s2_looks_at_two_scales(arg):
    toy = resolve_recipe(f"{ROOT}/configs/bunny_llama3_8b_s2.py:{arg},quick")
    config = BunnyConfig.from_hf(toy.model.config.to_dict())
    assert (config.s2_scales, config.vision.image_size, config.image_size) == ((32, 64), 32, 64)


@pytest.mark.parametrize("recipe", ["bunny_phi2_siglip.py:pretrain,", "otter_9b.py:"])
def test_a_toy_states_the_rows_that_its_words_make_so_another_toy_can_begin_from_it(recipe):
    """What model.config states replaces what the folder in model.init says of itself."""
    model = to_dataclass(RunSettings, resolve_recipe(f"{ROOT}/configs/{recipe}quick")).model
    made = build.blueprint(model, LoRASettings(), 0).config
    assert type(made).from_hf(model.config).vocab_size == made.vocab_size


@pytest.mark.parametrize("name", SAME_TOY)
def test_a_toy_is_the_one_that_goes_all_the_way(name):
    one, other = (resolve_recipe(f"{ROOT}/configs/{n}.py:quick") for n in (name, SAME_TOY[name]))
    differ = {k for k in one if one[k] != other[k]}
    assert differ <= {"name", "model", "lora", "data", "optim"}
    assert {k for k in one.optim if one.optim[k] != other.optim[k]} <= {"lr"}
    assert {k for k in one.data if one.data[k] != other.data[k]} <= {"resolutions"}
    assert {k for k in one.model if one.model[k] != other.model[k]} <= {"plan_config"}
    assert {k for k in one.lora if one.lora[k] != other.lora[k]} <= {"rank", "alpha", "targets"}


@pytest.mark.parametrize("name", [p.stem for p in RECIPES if p.stem not in SAME_TOY])
def test_a_toy_fits_all_of_its_data(name):
    """Two steps do not meet what is seldom: a toy has to go all of its own steps."""
    settings = to_dataclass(RunSettings, resolve_recipe(f"{ROOT}/configs/{name}.py:quick"))
    assert {r.name: dict(r.counts) for r in check(settings, limit=30) if r.counts} == {}


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(r, id=r.stem, marks=[pytest.mark.heavy] if r.stem in SIBLINGS else [])
        for r in RECIPES
        if r.stem not in SAME_TOY
    ],
)
def test_a_recipe_goes_all_the_way(file, tmp_path):
    settings, workdir = small(file), tmp_path / "run"
    loop.run(settings, workdir)
    if file.stem in EXPORTED:
        loop.run(dataclasses.replace(settings, steps=3), workdir)
    losses = logged(workdir)
    assert set(losses) == set(range(1, 4 if file.stem in EXPORTED else 3))
    assert np.isfinite(list(losses.values())).all()

    several = (several_pictures(tmp_path),) if file.stem in FAMILIES else ()
    asking = dataclasses.replace(settings.eval, tasks=(*settings.eval.tasks, *several))
    evaluation.run_eval(dataclasses.replace(settings, eval=asking), str(workdir), None)
    results = json.loads((workdir / "results.json").read_text())
    assert settings.eval.tasks[0]["name"] in results
    if several:  # each with its three pictures was asked
        assert results["mmmu"]["validation"]["n"] == 2
        assert "unreadable" not in results["mmmu"]["validation"]
    assert (workdir / "report.html").stat().st_size > 1000

    with pytest.raises(MMJaxError, match="int8 is for model folders .* WORKDIR/model"):
        evaluation.run_eval(settings, str(workdir), None, weights="int8")
    if file.stem == "quickstart":
        model, rounded = str(workdir / "model"), tmp_path / "int8"
        evaluation.run_eval(settings, model, str(rounded), weights="int8")
        asked = [json.loads((w / "results.json").read_text()) for w in (workdir, rounded)]
        assert asked[0].keys() == asked[1].keys() | {"mmmu"}

    if file.stem not in EXPORTED:
        return
    loaded = mmjax.load(workdir / "model")
    assert loaded.template == tasks.template_of(settings)
    record = make_source(next(iter(settings.data.sources.values())))[0]
    question, images = record.messages[0].text, list(record.images)
    answers = loaded.generate([question], [images], max_new_tokens=3)
    assert len(answers) == 1 and isinstance(answers[0], str)

    to_hf.main([str(workdir / "model"), str(tmp_path / "hf")])
    example = loaded.encode(question, images)
    ours = loaded.generate_tokens([example], max_new_tokens=3)[0].tolist()
    if loaded.family != "fuyu":  # no peer of it in torch here; what tests/parity shows is enough
        again = mmjax.load(tmp_path / "hf")
        assert again.generate_tokens([example], max_new_tokens=3)[0].tolist() == ours
        return
    theirs = FuyuForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32").eval()
    wanted = greedy(theirs, example, loaded, 3)
    assert ours == [t for t in wanted if t != loaded.config.eos_token_id] or ours == wanted
