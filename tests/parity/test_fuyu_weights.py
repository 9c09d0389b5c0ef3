"""Fuyu checkpoints made by PyTorch's side, through every layout and file format and back."""

import argparse
import json
import re

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import FuyuConfig, FuyuForCausalLM

import mmjax
from convert_weights import inspect, to_hf, to_jax
from mmjax.generate.loop import pad_batch
from mmjax.models import converted, opening, pretrained
from mmjax.monitor.transfer import gigabytes
from mmjax.nn.linear import LoRA
from mmjax.parallel.mesh import make_mesh, use
from mmjax.types import MMJaxError
from mmjax.weights.writer import Arrays
from tests.parity import forward, peer

IDS = torch.tensor([[1, 5, 5, 9, 33, 12, 60, 2]])
PATCHES = torch.randn(2, 48, generator=torch.Generator().manual_seed(3))


def randomise(model, seed=0, part=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def tiny_fuyu(**more):
    text = dict(
        model_type="persimmon",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=7,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 25000.0,
            "partial_rotary_factor": 0.5,
        },
    )
    config = FuyuConfig(
        text_config=text, patch_size=4, image_token_id=5, hidden_size=32, vocab_size=64, **more
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return randomise(FuyuForCausalLM(config))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A hub folder as transformers writes it, the torch model and its tensors."""
    folder = tmp_path_factory.mktemp("fuyu") / "hub"
    model = tiny_fuyu()
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder, model, load_file(folder / "model.safetensors")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, image_patches=PATCHES).logits.numpy()


def copy_config(published, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((published[0] / "config.json").read_text())


def read_all(path, **kwargs):
    opened = opening.open_pretrained(path, **kwargs)
    abstract = pretrained.abstract_params(opened.family, opened.config, lora=opened.lora)
    return opened, pretrained.read_params(opened, abstract)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert np.array_equal(np.asarray(a[key]), np.asarray(b[key])), key


def to_megatron(tensors):
    swaps = (
        ("self_attn", "self_attention"),
        ("language_model.lm_head", "word_embeddings_for_head"),
        ("language_model.model.embed_tokens", "language_model.embedding.word_embeddings"),
        ("language_model.model", "language_model.encoder"),
        ("vision_embed_tokens", "vit_encoder.linear_encoder"),
    )
    out = {}
    for key, value in tensors.items():
        for new, old in swaps:
            key = key.replace(new, old)
        out[key] = value
    out["image_patch_projection.weight"] = torch.zeros(3)
    out["language_model.encoder.layers.0.self_attention.rotary_emb.inv_freq"] = torch.zeros(2)
    return out


def nested(flat):
    tree = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def write_layout(published, folder, layout):
    """Write the published tensors in a layout or a file format."""
    copy_config(published, folder)
    tensors = published[2]
    if layout == "transformers5":
        published[1].save_pretrained(folder, save_original_format=False)
    elif layout == "megatron":
        tree = {"module": nested(to_megatron(tensors))["language_model"]}
        flat = to_megatron(tensors)
        tree = {
            "model": nested(flat),
            "iteration": 3,
            "args": argparse.Namespace(a=1),
        }
        torch.save(tree, folder / "model_optim_rng.pt")
    elif layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif layout == "module-pt":
        torch.save({f"module.{k}": v for k, v in tensors.items()}, folder / "last.pt")
    elif layout == "legacy-bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif layout in ("bin-index", "bin-shards"):
        keys = sorted(tensors)
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for name, part in zip(names, (keys[::2], keys[1::2]), strict=True):
            torch.save({k: tensors[k] for k in part}, folder / name)
        where = {k: names[i % 2] for i, k in enumerate(keys)}
        if layout == "bin-index":
            index = folder / "pytorch_model.bin.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    elif layout == "safetensors-index":
        published[1].save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").exists()


LAYOUTS = {
    "transformers5": "transformers5",
    "megatron": "megatron",
    "bin": "hub",
    "module-pt": "hub",
    "legacy-bin": "hub",
    "bin-index": "hub",
    "bin-shards": "hub",
    "safetensors-index": "hub",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_format_reads_the_same(published, tmp_path, layout):
    write_layout(published, tmp_path / "x", layout)
    opened, params = read_all(tmp_path / "x")
    assert (opened.kind, opened.family.name) == (LAYOUTS[layout], "fuyu")
    assert_same(params, read_all(published[0])[1])


def test_rules_put_every_number_where_the_model_expects_it(published):
    tensors = published[2]
    _, params = read_all(published[0])
    fused = tensors["language_model.model.layers.1.self_attn.query_key_value.weight"].numpy()
    for i, name in enumerate("qkv"):
        want = fused.T.reshape(32, 4, 3, 8)[:, :, i]
        assert np.array_equal(params[f"decoder.layers.attn.{name}.kernel"][1], want)
    out = tensors["language_model.model.layers.0.self_attn.dense.weight"].numpy()
    assert np.array_equal(params["decoder.layers.attn.o.kernel"][0], out.T.reshape(4, 8, 32))
    head = tensors["language_model.lm_head.weight"].numpy()
    assert np.array_equal(params["decoder.head.kernel"], head.T)


def test_a_checkpoint_without_config_is_measured(published, tmp_path):
    write_layout(published, tmp_path / "x", "megatron")
    (tmp_path / "x" / "config.json").unlink()
    opened = opening.open_pretrained(tmp_path / "x" / "model_optim_rng.pt")
    assert (opened.config.decoder.num_layers, opened.config.decoder.d_mlp) == (2, 48)
    assert (opened.config.patch_size, opened.config.decoder.rope_theta) == (4, 25000.0)


@pytest.mark.parametrize("layout", ["hub", "transformers5"])
def test_export_reloads_in_transformers_with_the_same_logits(published, tmp_path, layout):
    to_jax.main([str(published[0]), str(tmp_path / "jax")])
    assert (tmp_path / "jax" / "tokenizer_config.json").exists()
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "hf"), "--layout", layout])
    if layout == "hub":
        back = load_file(tmp_path / "hf" / "model.safetensors")
        assert back.keys() == published[2].keys()
        assert all(torch.equal(back[k], published[2][k]) for k in back)
    again = FuyuForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    assert np.abs(logits(again) - logits(published[1])).max() <= 1e-5
    assert again.config.text_config.rope_parameters["rope_theta"] == 25000.0


def test_a_tied_head_is_the_embedding_and_goes_back_as_that(tmp_path):
    theirs = tiny_fuyu(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "tied")
    assert not [key for key in load_file(tmp_path / "tied/model.safetensors") if "lm_head" in key]
    ours = mmjax.load(tmp_path / "tied")
    batch, _ = pad_batch(peer.examples([(IDS[0].numpy(), PATCHES.numpy())]))
    got = forward.logits(ours, batch)[0, : IDS.shape[1]]
    np.testing.assert_allclose(got, logits(theirs)[0], atol=1e-4)
    to_hf.main([str(tmp_path / "tied"), str(tmp_path / "out")])
    again = FuyuForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    np.testing.assert_array_equal(logits(again.eval()), logits(theirs))
    state = load_file(tmp_path / "tied/model.safetensors")
    head = state["language_model.model.embed_tokens.weight"].clone()
    save_file(state | {"language_model.lm_head.weight": head}, tmp_path / "tied/model.safetensors")
    assert_same(read_all(tmp_path / "tied")[1], read_all(tmp_path / "out")[1])


def test_bfloat16_conversion_rounds_and_reloads_bit_equal(published, tmp_path):
    to_jax.main([str(published[0]), str(tmp_path / "jax"), "--dtype", "bfloat16"])
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "hf")])
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(back[k], v.to(torch.bfloat16)) for k, v in published[2].items())


@pytest.fixture(scope="module")
def adapter(published, tmp_path_factory):
    """A PEFT adapter with a rank and a scale of its own for one module, and its torch model."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query_key_value", "dense", "dense_h_to_4h", "lm_head"],
        rank_pattern={"dense": 2},
        alpha_pattern={"lm_head": 3},
    )
    model = randomise(get_peft_model(tiny_fuyu(), config), seed=1, part="lora_")
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, model


def test_adapter_merges_to_the_same_logits(published, adapter, tmp_path):
    to_jax.main([str(adapter[0]), str(tmp_path / "jax"), "--base", str(published[0])])
    opened = opening.open_pretrained(tmp_path / "jax")
    assert (opened.kind, opened.lora.rank, opened.lora.alpha) == ("mmjax", 4, 8.0)
    assert set(opened.lora.targets) == {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "head"}
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "hf")])
    merged = FuyuForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    want = logits(adapter[1])
    assert np.abs(want - logits(published[1])).max() > 0.1
    np.testing.assert_allclose(logits(merged), want, atol=1e-4)


def test_adapter_comes_back_as_an_adapter(published, adapter, tmp_path):
    to_jax.main([str(adapter[0]), str(tmp_path / "jax"), "--base", str(published[0])])
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "peft"), "--adapter"])
    with pytest.raises(MMJaxError, match="--dtype float16: an adapter keeps its own"):
        to_hf.main([str(tmp_path / "jax"), str(tmp_path / "x"), "--adapter", "--dtype=float16"])
    model = PeftModel.from_pretrained(tiny_fuyu(), tmp_path / "peft").eval()
    np.testing.assert_allclose(logits(model), logits(adapter[1]), atol=1e-5)


def test_adapter_in_hub_names_reads_the_same(published, adapter, tmp_path):
    base = ["--base", str(published[0])]
    to_jax.main([str(adapter[0]), str(tmp_path / "jax"), *base])
    export = [str(tmp_path / "jax"), str(tmp_path / "hub"), "--adapter", "--layout", "hub"]
    to_hf.main(export)
    key = "base_model.model.language_model.lm_head.lora_A.weight"
    assert key in load_file(tmp_path / "hub" / "adapter_model.safetensors")
    to_jax.main([str(tmp_path / "hub"), str(tmp_path / "again"), *base])
    assert_same(read_all(tmp_path / "again")[1], read_all(tmp_path / "jax")[1])


def test_pickled_adapter_reads_the_same(published, adapter, tmp_path):
    config = (adapter[0] / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    tensors = load_file(adapter[0] / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    want = read_all(adapter[0], base=published[0])[1]
    assert_same(read_all(tmp_path, base=published[0])[1], want)


def test_inspect_tells_the_layout_and_the_theta(published, tmp_path, capsys):
    write_layout(published, tmp_path / "x", "megatron")
    config = json.loads((published[0] / "config.json").read_text())
    config["text_config"]["rope_parameters"] = None
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    assert inspect.main([str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert "fuyu, megatron" in shown and "model_optim_rng.pt" in shown
    assert "25000 (config.json says nothing" in shown
    assert "every key is claimed" in shown and "the published models" not in shown
    count, size = re.search(r"([\d,]+) in ([\d.]+ \w+)", shown).groups()
    assert size == gigabytes(4 * int(count.replace(",", "")))
    config["text_config"]["rope_parameters"] = {"rope_theta": 10000.0}  # as re-saved ones say
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    inspect.main([str(tmp_path / "x")])
    assert "10000 (config.json says 10000); the published models have" in capsys.readouterr().out


def test_inspect_lists_what_does_not_fit(published, tmp_path, capsys):
    copy_config(published, tmp_path)
    save_file({**published[2], "extra.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert inspect.main([str(tmp_path)]) == 2
    assert "1 unexpected: extra.weight" in capsys.readouterr().out


def test_trained_adapter_with_three_different_a_exports_exactly(published, tmp_path):
    opened, params = read_all(published[0])
    lora = LoRA(2, 6.0, ("attn.q", "attn.k", "attn.v", "mlp.down"))
    abstract = pretrained.abstract_params(opened.family, opened.config, lora=lora)
    for i, (name, leaf) in enumerate(abstract.items()):
        if "lora" in name:
            params[name] = 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
    converted.save_model(
        tmp_path / "jax", params, family=opened.family, config=opened.config, lora=lora
    )
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "peft"), "--adapter"])
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert about["rank_pattern"] == {"query_key_value": 6} and about["r"] == 2
    assert about["alpha_pattern"] == {"query_key_value": 18}
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "merged")])
    merged = FuyuForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(tiny_fuyu(), tmp_path / "peft").eval()
    np.testing.assert_allclose(logits(adapted), logits(merged.eval()), atol=1e-4)
    # And read back by us: one rank for all, the same update.
    to_jax.main([str(tmp_path / "peft"), str(tmp_path / "again"), "--base", str(published[0])])
    again, values = read_all(tmp_path / "again")
    for name in ("q", "k", "v"):
        a, b = (values[f"decoder.layers.attn.{name}.lora_{x}"] for x in "ab")
        x, y = (params[f"decoder.layers.attn.{name}.lora_{x}"] for x in "ab")
        got = np.einsum("ldr,lrnh->ldnh", a, b) * again.lora.scale
        want = np.einsum("ldr,lrnh->ldnh", x, y) * lora.scale
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_adapter_without_its_base_says_so(adapter):
    with pytest.raises(pretrained.MMJaxError, match="--base DIR"):
        opening.open_pretrained(adapter[0])


def test_all_differences_stand_in_one_error(published, tmp_path):
    tensors = dict(published[2])
    tensors.pop("language_model.model.final_layernorm.weight")
    tensors["surprise.weight"] = torch.zeros(2)
    tensors["language_model.lm_head.weight"] = torch.zeros(80, 32)
    copy_config(published, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(pretrained.R.WeightsMismatch) as error:
        read_all(tmp_path)
    text = str(error.value)
    assert "1 missing: language_model.model.final_layernorm.weight" in text
    assert "1 unexpected: surprise.weight" in text
    assert "language_model.lm_head.weight [80, 32] (the model has [64, 32])" in text
    assert "convert_weights.inspect" in text


def test_arrays_on_several_devices_are_exported_from_their_shards(published):
    _, params = read_all(published[0])
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    name = "decoder.layers.attn.q.kernel"
    with use(mesh):
        source = Arrays({name: jax.device_put(params[name], spec)})
        got = source.read(name, (slice(1, 2),))
    assert np.array_equal(got, np.asarray(params[name])[1:2])
