"""Bunny's published files both ways, from the weights and outputs of Bunny's own runs."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel

import mmjax
from convert_weights import average, inspect, merge, to_hf, to_jax
from mmjax.generate.loop import pad_batch
from mmjax.models import opening, pretrained
from mmjax.nn import paths
from mmjax.parallel.mesh import use
from mmjax.train import adapters
from mmjax.train.export import export_model
from mmjax.train.settings import LoRASettings
from mmjax.types import MMJaxError
from tests.parity import bunny_examples, bunny_files, bunny_golden, forward, vision_peer
from tests.parity.bunny_files import PROJECTOR
from tests.parity.bunny_golden import TOWER
from tests.parity.parameters import assert_same, options, read_all


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return bunny_files.Files("phi_siglip", tmp_path_factory.mktemp("phi"))


@pytest.fixture(scope="module")
def stablelm(tmp_path_factory):
    return bunny_files.Files("stablelm_clip", tmp_path_factory.mktemp("stablelm"))


def test_a_tower_is_inside_or_beside_under_either_of_its_names(phi, stablelm, tmp_path):
    for model in (phi, stablelm):
        golden, name = model.golden, model.golden.name
        for prefix in (True, False):
            where = tmp_path / f"{name} {prefix}"
            beside = bunny_golden.write_checkpoint(golden, where, tower="beside", prefix=prefix)
            model.same(beside)  # named by mm_vision_tower
            state = {
                k if prefix else k.replace("vision_tower.vision_model.", "vision_tower."): v
                for k, v in golden.weights.items()
            }
            config = golden.config | {"vision_config": golden.tower_config}
            model.same(bunny_files.write(state, where / "inside", config))  # sizes told there
            config = golden.config | {"mm_vision_tower": "google/somewhere"}
            bare = {k: v for k, v in state.items() if not k.startswith(TOWER)}
            bare = bunny_files.write(bare, where / "bare", config)
            model.same(bare, vision=where / golden.config["mm_vision_tower"])


def test_an_eva_tower_comes_from_its_own_file(tmp_path):
    eva = bunny_files.Files("phi_eva", tmp_path)
    bare = bunny_golden.write_checkpoint(eva.golden, tmp_path / "b", tower="beside")
    eva.same(bare, vision_config=eva.sizes)
    to_hf.main([str(bare), str(tmp_path / "hf"), "--vision-config", str(eva.sizes)])
    state = load_file(tmp_path / "hf" / "model.safetensors")
    head = {k: state.pop(k) for k in list(state) if ".model.head." in k}
    assert {x.shape for x in head.values()} == {(768, 32), (768,)}  # as published, never used
    assert state.keys() | head.keys() == eva.golden.weights.keys()
    for key, value in state.items():  # angles are computed anew
        atol = 1e-6 if ".rope.freqs_" in key else 0
        np.testing.assert_allclose(value, eva.golden.weights[key], atol=atol, rtol=0)
    eva.same(tmp_path / "hf")


def test_a_clip_tower_comes_from_open_clip_and_is_written_in_transformers_names(stablelm, tmp_path):
    torch.save(bunny_files.tensors(bunny_files.open_clip(stablelm.golden)), tmp_path / "clip.pt")
    bare = bunny_golden.write_checkpoint(stablelm.golden, tmp_path, tower="beside")
    stablelm.same(bare, vision=tmp_path / "clip.pt", vision_config=stablelm.sizes)
    to_hf.main([str(bare), str(tmp_path / "hf"), "--vision", str(tmp_path / "clip.pt"),
                "--vision-config", str(stablelm.sizes)])  # fmt: skip
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), stablelm.golden.weights)


def test_a_siglip_tower_comes_from_timm_and_is_written_in_transformers_names(phi, tmp_path):
    root = f"{TOWER}vision_model."
    state = {k.removeprefix(root): v for k, v in bunny_files.part(phi.golden, root).items()}
    save_file(vision_peer.timm_siglip(bunny_files.tensors(state)), tmp_path / "timm.safetensors")
    bare = bunny_golden.write_checkpoint(phi.golden, tmp_path, tower="beside")
    phi.same(bare, vision=tmp_path / "timm.safetensors", vision_config=phi.sizes)
    to_hf.main([str(bare), str(tmp_path / "hf"), "--vision", str(tmp_path / "timm.safetensors"),
                "--vision-config", str(phi.sizes)])  # fmt: skip
    written = load_file(tmp_path / "hf" / "model.safetensors")
    for key, value in written.items():  # SigLIP's head is as zeros there
        want = 0 if ".vision_model.head." in key else phi.golden.weights[key]
        np.testing.assert_array_equal(value, np.broadcast_to(want, value.shape), err_msg=key)


def test_a_siglip_of_the_first_release_lacks_its_last_layer_and_its_head(phi, tmp_path):
    """Nothing looks at either: the layers that are there are the same."""
    gone = re.compile(r"encoder\.layers\.2\.|\.head\.")
    state = {k: v for k, v in phi.golden.weights.items() if not gone.search(k)}
    folder = bunny_files.write(state, tmp_path / "a", phi.golden.config)
    opened, params = read_all(folder, vision_config=phi.sizes)
    assert (opened.config.vision.num_layers, opened.config.vision.feature_layer) == (2, -1)
    cut = {k: v[:2] if k.startswith("vision.layers.") else v for k, v in phi.params.items()}
    assert_same(params, cut)
    to_hf.main([str(folder), str(tmp_path / "hf"), "--vision-config", str(phi.sizes)])
    assert_same(read_all(tmp_path / "hf")[1], cut)


@pytest.mark.parametrize("path", bunny_golden.paths(), ids=lambda path: path.stem)
def test_every_golden_is_its_parts(path, tmp_path):
    """A projector alone, the language model as on a hub, and the tower are the merged model."""
    model = bunny_files.Files(path.stem.removeprefix("bunny_"), tmp_path)
    state, where = bunny_files.part(model.golden, PROJECTOR), tmp_path / "stage1"
    bunny_files.write(state, where, model.golden.config, "mm_projector.bin")
    model.same(where / "mm_projector.bin", **model.parts)
    model.same(where, **model.parts)


def test_a_projector_without_its_config_is_told_by_its_tensors(phi, tmp_path):
    state = bunny_files.part(phi.golden, PROJECTOR)
    bunny_files.write(state, tmp_path, None, "mm_projector.bin")
    opened, params = read_all(tmp_path / "mm_projector.bin", **phi.parts)
    assert_same(params, phi.params)
    kind, square = opened.config.projector.kind, opened.config.image_aspect_ratio
    assert (kind, square) == ("mlp2x_gelu", "square")  # as the peer reads a config without it


def test_phi_of_the_first_release_has_q_k_and_v_as_one_map(phi, tmp_path):
    config = phi.golden.config
    merged = bunny_files.write(bunny_files.fused(phi.golden.weights), tmp_path / "merged", config)
    phi.same(merged, vision_config=phi.sizes)
    lm = bunny_files.fused(bunny_files.language_state(phi.golden))
    lm = bunny_files.write(lm, tmp_path / "lm", bunny_files.language_config(phi.golden))
    state = bunny_files.part(phi.golden, PROJECTOR)
    bunny_files.write(state, tmp_path / "1", config, "mm_projector.bin")
    phi.same(tmp_path / "1", **{**phi.parts, "lm": lm})


def test_shards_pickles_and_wrappers_hold_the_same(phi, tmp_path):
    golden, half = phi.golden, len(phi.golden.weights) // 2
    items = list(golden.weights.items())
    shards = [dict(items[:half]), dict(items[half:])]
    for kind in ("safetensors", "bin"):
        stem = "model" if kind == "safetensors" else "pytorch_model"
        for i, shard in enumerate(shards, 1):
            file = f"{stem}-{i:05d}-of-00002.{kind}"
            bunny_files.write(shard, tmp_path / kind, golden.config, file)
        phi.same(tmp_path / kind, vision_config=phi.sizes)
    wrapped = {f"module.{k}": v for k, v in items}
    bunny_files.write(wrapped, tmp_path / "ddp", golden.config, "pytorch_model.bin")
    phi.same(tmp_path / "ddp", vision_config=phi.sizes)


def test_rows_of_the_vocabulary_are_those_of_the_checkpoint(phi, tmp_path):
    """The peer cuts the table to its tokenizer on merging; the base has more rows."""
    cut = ("model.embed_tokens.weight", "lm_head.weight")
    state = {k: v[:120] if k in cut else v for k, v in phi.golden.weights.items()}
    for stated in (120, 128):
        config = phi.golden.config | {"vocab_size": stated, "eos_token_id": 119}
        folder = bunny_files.write(state, tmp_path / str(stated), config)
        opened, params = read_all(folder, vision_config=phi.sizes)
        assert opened.config.vocab_size == 120
        assert params["decoder.embed.embedding"].shape == (120, 32)


def test_a_model_is_asked_with_squashed_pictures_as_its_evaluators_do(phi):
    asked = {"image_aspect_ratio": "square"}
    model = mmjax.load(phi.merged, vision_config=phi.sizes, processor=asked)
    assert model.config.image_aspect_ratio == model.processor.config.image_aspect_ratio == "square"


def test_in_fewer_bits_it_sees_with_an_unrounded_tower_and_projector(phi):
    model = mmjax.load(phi.merged, vision_config=phi.sizes, weights="int8").model
    params = {k: v for k, v in paths.flatten(nnx.state(model)).items() if k.endswith(".kernel")}
    rounded = {name.split(".")[0] for name, x in params.items() if x.dtype == np.int8}
    whole = {name.split(".")[0] for name, x in params.items() if x.dtype == np.float32}
    assert (rounded, whole) == ({"decoder"}, {"vision", "projector"})
    name = "vision.layers.attn.q.kernel"
    np.testing.assert_array_equal(params[name], phi.params[name])


# Adapters.


@pytest.fixture(scope="module")
def batch(phi):
    """Rows with images and without, padded on the right, and which places are filled."""
    rows, lengths = pad_batch(bunny_examples.examples(phi.golden.first, 4))
    return rows, np.arange(rows["tokens"].shape[1]) < np.array(lengths)[:, None]


@pytest.fixture(scope="module")
def lora(phi, batch, tmp_path_factory):
    """An adapter of PEFT on transformers' Phi in the peer's folder, its base, and its logits."""
    folder = tmp_path_factory.mktemp("lora")
    base = bunny_files.write_language_model(phi.golden, folder / "base")
    model = bunny_files.adapted(base, bunny_files.TARGETS["phi"])
    bunny_files.write_adapter(phi.golden, model, folder / "out")
    stream = run(mmjax.load(phi.merged, vision_config=phi.sizes), batch[0], "embed")
    with torch.no_grad():
        out = model(
            inputs_embeds=torch.from_numpy(stream), attention_mask=torch.from_numpy(batch[1])
        )
    return folder / "out", base, out.logits.numpy()


def run(ours, batch, what="logits"):
    if what == "logits":
        return forward.logits(ours, batch)
    with use(ours.mesh):
        return np.array(nnx.jit(lambda model, x: model.embed(x), graph=False)(ours.model, batch))


def assert_close(got, want, batch, limit=1e-5):
    """Fail where logits of filled places differ by more than this share of the largest."""
    got, want = got[batch[1]], want[batch[1]]
    assert np.abs(got - want).max() < limit * np.abs(want).max()


def test_an_adapter_answers_as_in_peft_merged_or_not(phi, lora, batch, tmp_path):
    folder, base, want = lora
    parts = {"base": base, "vision": phi.tower, "vision_config": phi.sizes}
    ours = mmjax.load(folder, **parts)
    apart = run(ours, batch[0])
    assert_close(apart, want, batch)
    plain = run(mmjax.load(phi.merged, vision_config=phi.sizes), batch[0])
    assert np.abs(apart - plain)[batch[1]].max() > 0.1  # the adapter does something
    merge.main([str(folder), str(tmp_path / "merged"), *options(parts)])
    assert_close(run(mmjax.load(tmp_path / "merged"), batch[0]), want, batch)


def test_an_adapter_of_continued_training_has_maps_of_the_tower_too(phi, lora, tmp_path):
    """PEFT takes what is named as Phi's maps are, there and in the pooling, which nobody asks."""
    folder, base, _ = lora
    pairs, rng = load_file(folder / "adapter_model.safetensors"), np.random.default_rng(0)
    for name in ("encoder.layers.0.self_attn.q_proj", "head.mlp.fc1", "head.mlp.fc2"):
        out, n = phi.golden.weights[f"{TOWER}vision_model.{name}.weight"].shape
        key = f"base_model.model.{TOWER}vision_model.{name}.lora_"
        pairs[f"{key}A.weight"] = rng.normal(size=(8, n)).astype(np.float32)
        pairs[f"{key}B.weight"] = rng.normal(size=(out, 8)).astype(np.float32)
    shutil.copytree(folder, tmp_path / "lora")
    tensors = bunny_files.tensors(pairs)
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    got, _ = read_all(tmp_path / "lora", base=base, vision=phi.tower, vision_config=phi.sizes)
    maps = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}
    assert set(got.lora.targets) == maps | {"vision.attn.q"}


def test_an_adapter_may_have_maps_of_the_projector(phi, lora, tmp_path):
    """As a run with lora.targets=("projector.*",) trains them: they count, by the same names."""
    folder, base, _ = lora
    pairs, rng = {}, np.random.default_rng(0)
    for name in ("0", "2"):
        out, n = phi.golden.weights[f"{PROJECTOR}{name}.weight"].shape
        key = f"base_model.model.{PROJECTOR}{name}.lora_"
        pairs[f"{key}A.weight"] = rng.normal(size=(8, n)).astype(np.float32)
        pairs[f"{key}B.weight"] = rng.normal(size=(out, 8)).astype(np.float32)
    shutil.copytree(folder, tmp_path / "lora")
    save_file(bunny_files.tensors(pairs), tmp_path / "lora" / "adapter_model.safetensors")
    parts = {"base": base, "vision": phi.tower, "vision_config": phi.sizes}
    got, params = read_all(tmp_path / "lora", **parts)
    assert got.lora == adapters.make_lora(
        LoRASettings(rank=8, alpha=16.0, dropout=0.05, targets=("projector.*",)),
        adapters.linear_maps(["projector.layers.0.kernel", "projector.layers.1.kernel"]),
    )
    for i, name in enumerate(("0", "2")):
        theirs = pairs[f"base_model.model.{PROJECTOR}{name}.lora_A.weight"]
        np.testing.assert_array_equal(params[f"projector.layers.{i}.lora_a"], theirs.T)


@pytest.mark.heavy
def test_an_adapter_is_the_same_in_every_form(phi, lora, tmp_path):
    folder, base, _ = lora
    golden, beside = phi.golden, {"vision": phi.tower, "vision_config": phi.sizes}
    want = read_all(folder, base=base, **beside)
    assert (want[0].lora.rank, want[0].lora.alpha, want[0].lora.dropout) == (8, 16, 0.05)
    maps = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}
    assert set(want[0].lora.targets) == maps

    def same(path, **parts):
        got = read_all(path, **parts)
        assert (got[0].lora, got[0].config) == (want[0].lora, want[0].config)
        assert_same(got[1], want[1])

    same(folder, **beside)  # adapter_config.json names its base by a path
    same(folder, lm=base, **beside)
    model = bunny_files.adapted(base, bunny_files.TARGETS["phi"])
    same(
        bunny_files.write_adapter(golden, model, tmp_path / "bin", safe=False), base=base, **beside
    )
    assert (tmp_path / "bin" / "adapter_model.bin").is_file()
    # Fine-tuning that went on from a merged model, whose projector and tower are older.
    older = {k: v + k.startswith((PROJECTOR, TOWER)) for k, v in golden.weights.items()}
    merged = bunny_files.write(older, tmp_path / "merged", golden.config)
    trained = bunny_files.write_adapter(golden, model, tmp_path / "trained", tower=True)
    same(trained, base=merged, vision_config=phi.sizes)
    same(trained, base=base, vision_config=phi.sizes)
    got = read_all(folder, base=merged, vision_config=phi.sizes)[1]
    assert_same(got, {k: v + k.startswith("vision.") for k, v in want[1].items()})


def test_an_adapter_of_phi_with_one_map_for_q_k_and_v(phi, tmp_path):
    """As the first release trained them: W + alpha / r B A, then cut into the three."""
    golden, rng = phi.golden, np.random.default_rng(0)
    weights, pairs = bunny_files.fused(golden.weights), {}
    base = bunny_files.write(weights, tmp_path / "base", golden.config)
    for key in [k for k in weights if k.endswith("query_key_value.weight")]:
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 32), (96, 4)))
        stem = "base_model.model." + key.removesuffix("weight")
        pairs |= {f"{stem}lora_A.weight": a, f"{stem}lora_B.weight": b}
        weights[key] = weights[key] + np.float32(2) * (b @ a)
    bunny_files.write(pairs, tmp_path / "lora", golden.config, "adapter_model.bin")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(about))
    opened = opening.open_pretrained(tmp_path / "lora", base=base, vision_config=phi.sizes)
    with use():
        whole = pretrained.merged(opened)
    want = read_all(bunny_files.write(weights, tmp_path / "merged", golden.config),
                    vision_config=phi.sizes)[1]  # fmt: skip
    for name in ("q", "k", "v"):
        name = f"decoder.layers.attn.{name}.kernel"
        np.testing.assert_allclose(whole.reader.read(name), want[name], atol=1e-5)
    with pytest.raises(MMJaxError, match="2 modules 2 are none of this model's.*query_key_value"):
        read_all(tmp_path / "lora", base=phi.merged, vision_config=phi.sizes)


def test_a_run_that_trains_the_tower_says_so_in_what_it_writes(phi, tmp_path):
    """Else the peer would take the published one, and an adapter would leave it out."""
    ours = mmjax.load(phi.merged, vision_config=phi.sizes)
    ours = dataclasses.replace(
        ours, config=dataclasses.replace(ours.config, unfreeze_vision_tower=False)
    )
    for i, (name, told) in enumerate({"vision.embed.kernel": True, "projector.layers.0.bias": False,
                                      "vision.layers.attn.q.lora_a": False}.items()):  # fmt: skip
        export_model(ours, tmp_path / str(i), None, {"decoder.embed.embedding", name})
        config = json.loads((tmp_path / str(i) / "config.json").read_text())
        assert config["unfreeze_vision_tower"] is told, name


def test_an_adapter_tells_what_it_leaves_out(phi, lora, tmp_path, caplog):
    """The projector lies beside it; of all else that a run trained it has nothing."""
    parts = options({"base": lora[1], "vision": phi.tower, "vision_config": phi.sizes})
    to_jax.main([str(lora[0]), str(tmp_path / "jax"), *parts])
    about = json.loads((tmp_path / "jax" / "config.json").read_text())
    for i, more in enumerate(([], ["decoder.embed.embedding"])):
        about["mmjax"]["trained"] = ["projector.*", *more]
        (tmp_path / "jax" / "config.json").write_text(json.dumps(about))
        to_hf.main([str(tmp_path / "jax"), str(tmp_path / f"peft{i}"), "--adapter"])
        beside = torch.load(tmp_path / f"peft{i}" / "non_lora_trainables.bin", weights_only=True)
        assert beside and all("mm_projector" in key for key in beside)
        assert ("leaves out decoder.embed.embedding, which" in caplog.text) is bool(more)
    assert "projector" not in caplog.text
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "1"), "--layout", "projector"])
    assert "mm_projector.bin leaves out what the adapters change" in caplog.text
    state = torch.load(tmp_path / "1" / "mm_projector.bin", weights_only=True)
    assert state and all(key.startswith(PROJECTOR) for key in state)


def test_adapters_alone_are_not_read_without_the_projector_trained_with_them(phi, lora):
    run = adapters.make_lora(LoRASettings(rank=8, alpha=16.0), ["attn.q", "mlp.up"])
    says = "non_lora_trainables.bin was trained with its adapters.*convert_weights.to_jax makes"
    with pytest.raises(MMJaxError, match=says):
        adapters.read(str(lora[0]), run, "bunny", phi.opened.config, {})


@pytest.mark.heavy
def test_recipes_are_averaged_with_their_adapters_merged_first(phi, lora, tmp_path):
    folder, base, _ = lora
    parts = {"base": base, "vision": phi.tower, "vision_config": phi.sizes}
    other = shutil.copytree(folder, tmp_path / "other")
    about = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(about | {"lora_alpha": 48}))
    sums = {}
    for path, weight in ((folder, 0.3), (other, 0.7)):
        merge.main([str(path), str(tmp_path / str(weight)), *options(parts)])
        for name, value in read_all(tmp_path / str(weight))[1].items():
            sums[name] = sums.get(name, 0) + np.float32(weight) * value
    average.main(["--out", str(tmp_path / "x"), f"{folder}:0.3", f"{other}:0.7", *options(parts)])
    opened, params = read_all(tmp_path / "x")
    assert opened.config == phi.opened.config and params.keys() == sums.keys()
    for name, value in sums.items():
        np.testing.assert_allclose(params[name], value, atol=1e-6, err_msg=name)


def test_inspect_shows_each_part_and_where_it_lies(phi, lora, capsys):
    parts = {"base": lora[1], "vision": phi.tower, "vision_config": phi.sizes}
    assert inspect.main([str(lora[0]), *options(parts)]) == 0
    shown = re.sub(r"\s*│\n│\s+│\s*", " ", capsys.readouterr().out)
    assert "bunny, peft" in shown and "every key is claimed" in shown
    files = "base/model.safetensors, siglip-tiny/model.safetensors, out/non_lora_trainables.bin"
    assert f"{files}, out/adapter_model.safetensors" in shown
    assert "decoder 32,384, projector 2,112, vision 41,552" in shown
    assert "kind mlp2x_gelu, d_vision 32, d_model 32" in shown


# Written back.


@pytest.fixture(scope="module")
def exported(phi, stablelm, tmp_path_factory):
    """What to_hf writes of the two models, and its tensors."""
    out = {}
    for model in (phi, stablelm):
        folder = tmp_path_factory.mktemp("out") / "hf"
        to_hf.main([str(model.merged), str(folder), "--vision-config", str(model.sizes)])
        out[model.golden.language] = folder, load_file(folder / "model.safetensors")
    return out


def test_what_is_written_is_the_peers_own_bit_for_bit(phi, stablelm, exported):
    for model in (phi, stablelm):
        folder, state = exported[model.golden.language]
        model.same(folder)  # the tower's sizes are told in it
        config = json.loads((folder / "config.json").read_text())
        left = {"torch_dtype", "transformers_version", "use_cache", "rope_scaling"}
        left |= {"mm_projector_lr", "attention_dropout"}
        theirs = {k: v for k, v in model.golden.config.items() if k not in left}
        assert {k: config[k] for k in theirs} == theirs
        assert state.keys() == model.golden.weights.keys()
        unused = {k for k in state if ".vision_model.head." in k}  # by anything in the peer
        assert not any(state[k].any() for k in unused)
        assert all(state[k].shape == model.golden.weights[k].shape for k in unused)
        assert_same({k: state[k] for k in state.keys() - unused},
                    {k: v for k, v in model.golden.weights.items() if k not in unused})  # fmt: skip


def test_transformers_loads_the_language_model_and_the_tower_of_an_export(
    phi, stablelm, exported, tmp_path
):
    """Text alone through the one, pictures through the other: the peer's own numbers."""
    for model, kind in ((phi, SiglipVisionModel), (stablelm, CLIPVisionModel)):
        (folder, state), case = exported[model.golden.language], model.golden.first
        config = json.loads((folder / "config.json").read_text())
        lm = {k: v for k, v in state.items() if not k.startswith((PROJECTOR, TOWER))}
        own = config | {"model_type": config["model_type"].removeprefix("bunny-")}
        bunny_files.write(lm, tmp_path / own["model_type"], own)
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / own["model_type"])
        row = int(np.flatnonzero((case.ids != -200).all(1))[0])  # without an image
        n = int(case.attention_mask[row].sum())
        tower = {k.removeprefix(TOWER): v for k, v in state.items() if k.startswith(TOWER)}
        where = bunny_files.write(tower, tmp_path / kind.__name__, config["vision_config"])
        tower = kind.from_pretrained(where)
        connector = torch.nn.Sequential(
            torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)
        )
        maps = {k.removeprefix(PROJECTOR): v for k, v in state.items() if k.startswith(PROJECTOR)}
        connector.load_state_dict(bunny_files.tensors(maps))
        with torch.no_grad():
            logits = lm(torch.from_numpy(case.ids[row : row + 1, :n])).logits[0].numpy()
            seen = tower(torch.from_numpy(case.pixel_values), output_hidden_states=True)
            features = connector(seen.hidden_states[-2][:, -4:]).numpy()  # without a class token
        np.testing.assert_allclose(logits, case.logits[row, :n], atol=1e-5)
        largest = np.abs(case.features).max()
        np.testing.assert_allclose(features, case.features, atol=3e-6 * largest)


def test_stage_1_is_written_as_the_peer_saves_it(phi, tmp_path, caplog):
    """Its loader takes a projector only where config.json says that the tower was not trained."""
    assert phi.golden.config["unfreeze_vision_tower"]
    to_hf.main([str(phi.merged), str(tmp_path / "1"), "--layout", "projector",
                "--vision-config", str(phi.sizes)])  # fmt: skip
    assert "a projector alone leaves out the vision tower, which was trained" in caplog.text
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    assert config["unfreeze_vision_tower"] is False
    state = torch.load(tmp_path / "1" / "mm_projector.bin", weights_only=True)
    assert_same({k: v.numpy() for k, v in state.items()}, bunny_files.part(phi.golden, PROJECTOR))
    phi.same(tmp_path / "1", **phi.parts)


@pytest.mark.heavy
def test_an_adapter_goes_out_to_peft_and_comes_back(phi, lora, batch, tmp_path):
    folder, base, want = lora
    parts = {"vision": phi.tower, "vision_config": phi.sizes}
    argv = [str(folder), str(tmp_path / "peft"), "--adapter", "--base", str(base)]
    to_hf.main([*argv, *options(parts)])
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["task_type"]) == (8, 16, "CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    stream = run(mmjax.load(phi.merged, vision_config=phi.sizes), batch[0], "embed")
    with torch.no_grad():
        out = model(
            inputs_embeds=torch.from_numpy(stream), attention_mask=torch.from_numpy(batch[1])
        )
    assert_close(out.logits.numpy(), want, batch, limit=1e-6)
    adapted = {k for k, _ in model.named_parameters() if ".lora_A." in k}
    assert len(adapted) == 2 * 6  # of both layers; the tower's maps are called alike
    assert not any(
        re.fullmatch(about["target_modules"], f"{TOWER}vision_model.{name}")
        for name in ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1")
    )
    beside = torch.load(tmp_path / "peft" / "non_lora_trainables.bin", weights_only=True)
    theirs = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert_same(beside, theirs)
    first = read_all(folder, base=base, **parts)
    again = read_all(tmp_path / "peft", base=base, **parts)
    assert (again[0].lora, again[0].config) == (first[0].lora, first[0].config)
    assert_same(again[1], first[1])


@pytest.mark.heavy
def test_a_trained_tower_goes_out_with_the_adapter(phi, lora, tmp_path):
    model = bunny_files.adapted(lora[1], bunny_files.TARGETS["phi"])
    golden = dataclasses.replace(
        phi.golden, weights={k: v + k.startswith(TOWER) for k, v in phi.golden.weights.items()}
    )
    trained = bunny_files.write_adapter(golden, model, tmp_path / "trained", tower=True)
    argv = [str(trained), str(tmp_path / "out"), "--adapter", "--base", str(phi.merged)]
    to_hf.main([*argv, "--vision-config", str(phi.sizes)])
    state = torch.load(tmp_path / "out" / "non_lora_trainables.bin", weights_only=True)
    theirs = torch.load(trained / "non_lora_trainables.bin", weights_only=True)
    assert theirs.keys() - state.keys() == {k for k in theirs if ".head." in k}  # never used
    assert_same(state, {k: theirs[k] for k in state})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["unfreeze_vision_tower"] is True  # else the peer would take the published one
