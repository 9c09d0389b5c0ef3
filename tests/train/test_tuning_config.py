"""A peer's tuning configs put into our settings, for the language models they are written for."""

import dataclasses
import json
from pathlib import Path

import pytest

from mmjax.config import resolve_recipe
from mmjax.nn import paths
from mmjax.parallel.mesh import use
from mmjax.schema import to_dataclass
from mmjax.train import adapters, build, optim, startup, state, tuning
from mmjax.train.settings import LoRASettings, RunSettings
from mmjax.types import MMJaxError
from mmjax.weights.tables import linear, norm
from mmjax.weights.tuning import PeerNames
from tests import small_flamingo

GATED = ["to_q", "to_kv", "to_out", "ff.1", "ff.3"]
MPT, LLAMA = ["Wqkv", "out_proj", "up_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
CROSS_MAPS = {f"cross.{m}" for m in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")}
ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.o"}


def write(tmp_path, **keys):
    file = tmp_path / "tuning.json"
    shared = dict(lora=True, from_pretrained=False, lora_r=4, lora_alpha=2, lora_dropout=0.0)
    file.write_text(json.dumps(shared | dict(lora_target_modules=[], unfrozen=[]) | keys))
    return file


def apply(file, language="mpt", **settings):
    lora = LoRASettings(tuning_config=str(file))
    return tuning.applied(RunSettings(model=small_flamingo.model(language), lora=lora, **settings))


def trained(settings):
    plan = build.blueprint(settings.model, settings.lora, 0)
    return state.chosen_by(settings, plan.names())


def parts(names):
    return {name.split(".")[0] for name in names}


def test_language_model_adapted_and_resampler_trained_whole(tmp_path):
    """The peer's lora+perceiver: four modules of MPT, not the gated blocks."""
    got, _ = apply(write(tmp_path, lora_target_modules=MPT, unfrozen=["perceiver"]))
    assert set(got.lora.targets) == ATTENTION | {"mlp.up", "mlp.down"}
    assert (got.lora.rank, got.lora.alpha, got.lora.dropout) == (4, 2.0, 0.0)
    assert got.train == ("perceiver.*",) and got.lora.tuning_config is None
    names = trained(got)
    assert parts(names) == {"decoder", "perceiver"}
    assert all(n.startswith("perceiver.") or n.endswith(("lora_a", "lora_b")) for n in names)
    whole = build.blueprint(got.model, got.lora, 0).names()
    assert {n for n in whole if n.startswith("perceiver.")} <= names
    assert {n for n in whole if n.endswith("lora_a")} == {
        f"decoder.layers.{m}.lora_a" for m in got.lora.targets
    }


@pytest.mark.parametrize(
    "language, maps, absent",
    [
        ("mpt", ATTENTION | {"mlp.up", "mlp.down"}, LLAMA),
        # Each model takes those of the file that it has: LLaMA has up_proj and down_proj as well.
        ("llama", ATTENTION | {"mlp.up", "mlp.down"}, ["Wqkv"]),
    ],
)
def test_a_file_for_several_language_models(tmp_path, language, maps, absent):
    """The peer's lora[lm+xattn]+perceiver: thirteen names, of which a model has some."""
    file = write(tmp_path, lora_target_modules=[*MPT, *LLAMA, *GATED], unfrozen=["perceiver"])
    got, told = apply(file, language)
    assert set(got.lora.targets) == maps | CROSS_MAPS
    for name in absent:
        assert name in told["tuning"]
    assert parts(trained(got)) == {"decoder", "cross", "perceiver"}


def test_no_adapters(tmp_path):
    got, _ = apply(write(tmp_path, lora=False, unfrozen=["perceiver", "gated_cross_attn_layer"]))
    assert got.lora == LoRASettings() and set(got.train) == {"perceiver.*", "cross.*"}
    names = trained(got)
    assert parts(names) == {"perceiver", "cross"} and "cross.attn_gate" in names


def test_embeddings_are_those_of_the_language_model_alone(tmp_path):
    """The tower's are frozen in the peer, whatever is unfrozen."""
    got, _ = apply(write(tmp_path, lora=False, unfrozen=["embed"]), "llama")
    assert trained(got) == {"decoder.embed.embedding"}


def test_adapters_that_are_read_stay_as_they_are(tmp_path, monkeypatch):
    """As PEFT's from_pretrained: only what is unfrozen is trained beside them."""
    opened = dataclasses.make_dataclass("Opened", ["lora"])
    adapter = adapters.LoRA(3, 6.0, ("attn.q",))
    monkeypatch.setattr(tuning.opening, "open_adapters", lambda *_: opened(adapter))
    file = write(tmp_path, from_pretrained=str(tmp_path), unfrozen=["perceiver"])
    got, _ = apply(file)
    assert got.lora == LoRASettings(3, 6.0, False, 0.0, ("attn.q",), str(tmp_path))
    assert parts(trained(got)) == {"perceiver"}


@pytest.mark.parametrize(
    "keys, says",
    [
        (dict(lora_target_modules=["Wqvk"]), ["'Wqvk', and no module", "did you mean 'Wqkv'?"]),
        (dict(lora_target_modules=["ff"]), ["'ff', and no module ends with it", "ff.1"]),
        (dict(lora_target_modules=LLAMA), ["none of lora_target_modules", "Wqkv"]),
        (dict(lora_target_modules=MPT, unfrozen=["percever"]), ["did you mean 'perceiver'?"]),
        (dict(lora=False), ["leave nothing to train"]),
        (dict(lora_rank=4), ["unknown config key", "lora_r"]),
    ],
)
def test_names_that_match_nothing_are_named(tmp_path, keys, says):
    with pytest.raises(MMJaxError) as error:
        apply(write(tmp_path, **keys))
    for part in (*says, "tuning.json"):
        assert part in str(error.value)


def test_files_and_families_without_them(tmp_path):
    with pytest.raises(MMJaxError, match=r"absent\.json: No such file"):
        apply(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(MMJaxError, match="no JSON"):
        apply(tmp_path / "broken.json")
    file = write(tmp_path, lora_target_modules=MPT)
    with pytest.raises(MMJaxError, match="leave the other settings"):
        apply(file, train=("cross.*",))
    with pytest.raises(MMJaxError, match="no peer of family 'fuyu'"):
        tuning.applied(RunSettings(lora=LoRASettings(tuning_config=str(file))))
    assert tuning.applied(RunSettings()) == (RunSettings(), {})


def test_targets_are_whole_words_of_modules_and_unfrozen_strings_any_part_of_a_name():
    rules = (
        *linear("layers.q", "h.{l}.attn.q_proj"), *norm("layers.norm", "h.{l}.q_proj_norm"),
        *linear("cross.up", "gated.{l}.ff.1"), *linear("head", "lm_head"),
    )  # fmt: skip
    peer = PeerNames(rules, rules, frozenset({"mlp.up_proj"}))
    names = [rule.ours for rule in rules if not rule.ours.startswith(("head", "layers.q.b"))]
    for target in ("q_proj", "attn.q_proj", "h.{l}.attn.q_proj"):
        assert peer.kernels(target, names) == ["layers.q.kernel"]
    for target in ("ff.1", "1"):
        assert peer.kernels(target, names) == ["cross.up.kernel"]
    for target in ("proj", "ff", "q_proj_norm", "bias", "weight", "lm_head", ""):
        assert peer.kernels(target, names) == []
    whole = ["layers.q.kernel", "layers.norm.scale", "layers.norm.bias"]
    assert peer.holding("q_proj", names) == whole
    assert peer.holding("norm.bias", names) == whole[2:] and not peer.holding("head", names)
    assert peer.modules() == ["q_proj", "ff.1", "lm_head"]
    words = ("up_proj", "mlp.up_proj", "proj", "q_proj")
    assert [peer.knows_elsewhere(word) for word in words] == [True, True, False, False]


def test_patterns_of_the_decoder_catch_no_other_part():
    plan = build.blueprint(small_flamingo.MODEL, LoRASettings(rank=2), 0)
    assert set(plan.lora.targets) == ATTENTION | {"mlp.up", "mlp.down"}
    assert parts(n for n in plan.names() if n.endswith("lora_a")) == {"decoder"}
    lora = LoRASettings(rank=2, targets=("attn.*", "cross.*", "vision.attn.q", "perceiver.mlp.*"))
    maps = adapters.linear_maps(build.blueprint(small_flamingo.MODEL, LoRASettings(), 0).names())
    want = ATTENTION | CROSS_MAPS | {"vision.attn.q", "perceiver.mlp.up", "perceiver.mlp.down"}
    assert set(adapters.expand(lora.targets, maps)) == want
    made = build.blueprint(small_flamingo.MODEL, lora, 0)
    adapted = adapters.linear_maps(
        [n.replace("lora_a", "kernel") for n in made.names() if n.endswith("lora_a")]
    )
    assert set(adapted) == want


def test_adapters_and_whole_parts_are_one_state(tmp_path):
    got, _ = apply(write(tmp_path, lora_target_modules=[*MPT, *GATED], unfrozen=["perceiver"]))
    with use() as mesh:
        plan = build.blueprint(got.model, got.lora, 0)
        chosen = state.chosen_by(got, plan.names())
        tx = optim.make_optimizer(got.optim, 10)
        _, train, frozen = state.abstract_state(plan.make, chosen, tx, mesh)
    rows = startup.part_rows(train, frozen, got, {})
    names, rest = set(paths.flatten(train.params)), set(paths.flatten(frozen))
    assert names == chosen and {"perceiver.latents", "cross.attn.q.lora_a"} <= names
    assert {"cross.attn.q.kernel", "decoder.embed.embedding"} <= rest
    table = {part: (trained, total) for part, trained, total, _ in rows}
    assert table["perceiver"][0] == table["perceiver"][1] > 0
    assert table["vision"][0] == table["decoder.embed"][0] == 0 < table["vision"][1]
    assert 0 < table["cross"][0] < table["cross"][1]
    assert 0 < table["decoder.layers"][0] < table["decoder.layers"][1]


@pytest.mark.parametrize("name", ["clever_flamingo_lora", "clever_flamingo_9b"])
def test_a_recipe_takes_a_file_in_place_of_its_own_adapters(tmp_path, name):
    file = write(tmp_path, lora_target_modules=["Wqkv"], unfrozen=["perceiver.norm"])
    recipe = Path(__file__).parents[2] / f"configs/{name}.py"
    plain = to_dataclass(RunSettings, resolve_recipe(recipe))
    given = to_dataclass(RunSettings, resolve_recipe(f"{recipe}:quick,tuning={file}"))
    got, _ = tuning.applied(given)
    assert set(got.lora.targets) == {"attn.q", "attn.k", "attn.v"} and got.lora.rank == 4
    assert set(got.train) == {"perceiver.final_norm.scale", "perceiver.final_norm.bias"}
    assert (plain.lora.tuning_config, plain.train) == (None, ("perceiver.*",))
    assert given.optim == dataclasses.replace(plain.optim, warmup=given.optim.warmup)
