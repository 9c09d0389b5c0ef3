"""Adapters beside `peft`: ours load there and answer alike, theirs go on here."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import FuyuForCausalLM

from convert_weights import merge, to_hf
from mmjax.models import converted, opening, pretrained, registry
from mmjax.models.fuyu.model import Fuyu, FuyuConfig
from mmjax.nn import paths
from mmjax.nn.linear import LoRA
from mmjax.parallel.mesh import use
from mmjax.train import adapters
from mmjax.types import MMJaxError
from tests.parity import peer

FAMILY = registry.family("fuyu")
SAMPLES = [peer.sample(1, [3, (2, 3), 5]), peer.sample(2, [4, (1, 2), 2])]
EVERY = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "head", "patch_embed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The peer's model in a hub folder, its config and its parameters here."""
    folder = tmp_path_factory.mktemp("base") / "hub"
    peer.tiny_fuyu().save_pretrained(folder)
    with use():
        opened = opening.open_pretrained(folder)
        params = pretrained.read_params(
            opened, pretrained.abstract_params(FAMILY, opened.config, lora=None)
        )
    return folder, opened.config, params


def torch_logits(model):
    with torch.no_grad():
        out = model.eval()(**peer.left_padded(SAMPLES)).logits.numpy()
    longest = out.shape[1]
    return [row[longest - len(ids) :] for row, (ids, _) in zip(out, SAMPLES, strict=True)]


@jax.jit
def run(parts, batch):
    model = nnx.merge(*parts)
    return model.logits(model(batch))


def our_logits(params, config: FuyuConfig, lora):
    graphdef, state = nnx.split(Fuyu(config, rngs=nnx.Rngs(0), lora=lora))
    out = np.asarray(run((graphdef, paths.replace(state, params)), peer.right_padded(SAMPLES)))
    return [row[: len(ids)] for row, (ids, _) in zip(out, SAMPLES, strict=True)]


def trained(base, lora, seed=0):
    """All parameters, the adapters as far from their start as training takes them."""
    _, config, params = base
    abstract = pretrained.abstract_params(FAMILY, config, lora=lora)
    keys = jax.random.split(jax.random.key(seed), len(abstract))
    new = {
        name: 0.1 * jax.random.normal(key, leaf.shape)
        for key, (name, leaf) in zip(keys, abstract.items(), strict=True)
        if ".lora_" in name
    }
    return {**params, **new}


def assert_alike(ours, theirs, atol=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


CASES = {
    "every map": LoRA(4, 8.0, EVERY),
    "rslora": LoRA(4, 3.0, EVERY, rslora=True, dropout=0.05),
    "q and v of the fused map": LoRA(2, 6.0, ("attn.q", "attn.v")),
}


@pytest.mark.parametrize(
    "case",
    ["every map", *(pytest.param(case, marks=pytest.mark.heavy) for case in list(CASES)[1:])],
)
def test_an_export_answers_in_peft_as_it_does_here(base, tmp_path, case):
    lora = CASES[case]
    params = trained(base, lora)
    ours = our_logits(params, base[1], lora)
    plain = our_logits(base[2], base[1], None)
    assert max(np.abs(a - b).max() for a, b in zip(ours, plain, strict=True)) > 0.05
    converted.save_model(tmp_path / "x", params, family=FAMILY, config=base[1], lora=lora)
    to_hf.main([str(tmp_path / "x"), str(tmp_path / "peft"), "--adapter"])
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (about["use_rslora"], about["lora_dropout"]) == (lora.rslora, lora.dropout)
    assert (about["r"], about["lora_alpha"]) == (lora.rank, lora.alpha)
    adapted = PeftModel.from_pretrained(peer.tiny_fuyu(), tmp_path / "peft")
    assert_alike(ours, torch_logits(adapted))
    assert_alike(ours, torch_logits(adapted.merge_and_unload()))
    # Merged here, the same numbers: as a folder of ours and as transformers' model.
    merge.main([str(tmp_path / "x"), str(tmp_path / "merged")])
    opened = opening.open_pretrained(tmp_path / "merged")
    assert opened.lora is None
    values = pretrained.read_params(opened, pretrained.abstract_params(FAMILY, base[1]))
    assert_alike(our_logits(values, base[1], None), ours, atol=1e-5)
    to_hf.main([str(tmp_path / "merged"), str(tmp_path / "hf")])
    whole = FuyuForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert_alike(ours, torch_logits(whole))


def draw_adapters(model, seed):
    """Give both halves of all adapters random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """An adapter that PEFT trained, with rsLoRA, and its model."""
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, lora_dropout=0.1,
        target_modules=["query_key_value", "dense_h_to_4h", "vision_embed_tokens"],
    )  # fmt: skip
    model = get_peft_model(peer.tiny_fuyu(), config)
    draw_adapters(model, 1)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return folder, model


def test_an_alpha_pattern_speaks_of_modules_by_pefts_own_names(base, tmp_path):
    """Whole names, anchored ones and expressions; here the modules have the names of the hub."""
    layers = "model.language_model.layers"
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["query_key_value", "dense", "dense_h_to_4h"],
        alpha_pattern={
            f"{layers}.0.self_attn.query_key_value": 11,
            f"^{layers}.1.mlp.dense_h_to_4h": 7,
            rf"{layers}\.\d+\.self_attn\.dense": 5,
        },
    )
    model = get_peft_model(peer.tiny_fuyu(), config)
    draw_adapters(model, 2)
    model.save_pretrained(tmp_path)
    opened = opening.open_pretrained(tmp_path, base=base[0])
    abstract = pretrained.abstract_params(FAMILY, base[1], lora=opened.lora)
    params = pretrained.read_params(opened, abstract)
    assert_alike(our_logits(params, base[1], opened.lora), torch_logits(model))


@pytest.mark.parametrize(
    "name, value",
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [9]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("use_dora", True),
        ("target_parameters", ["mlp.dense_h_to_4h.weight"]),
        ("trainable_token_indices", [3]),
        ("kasa_config", {"beta": 0.1}),
    ],
)
def test_what_is_more_than_a_pair_beside_its_base_is_refused(base, theirs, tmp_path, name, value):
    """Their files hold A and B like any other's, and PEFT makes something else of them."""
    about = json.loads((theirs[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**about, name: value}))
    weights = "adapter_model.safetensors"
    (tmp_path / weights).write_bytes((theirs[0] / weights).read_bytes())
    with pytest.raises(
        MMJaxError, match=f"adapter_config.json (says|sets) {name}.*merge_and_unload"
    ):
        opening.open_pretrained(tmp_path, base=base[0])


THEIRS = LoRA(
    4, 6.0, ("attn.q", "attn.k", "attn.v", "mlp.up", "patch_embed"), rslora=True, dropout=0.1
)


def test_an_adapter_of_peft_answers_here_as_it_does_there(base, theirs):
    opened = opening.open_pretrained(theirs[0], base=base[0])
    assert opened.lora == THEIRS
    abstract = pretrained.abstract_params(FAMILY, base[1], lora=opened.lora)
    params = pretrained.read_params(opened, abstract)
    assert_alike(our_logits(params, base[1], opened.lora), torch_logits(theirs[1]))
    # q, k and v are three maps here and one there: each begins with a copy of its A.
    a = [params[f"decoder.layers.attn.{name}.lora_a"] for name in "qkv"]
    np.testing.assert_array_equal(a[0], a[1])
    np.testing.assert_array_equal(a[0], a[2])


def test_training_goes_on_from_an_adapter_of_peft(base, theirs):
    """Its maps begin with its numbers, and a map that it does not have is left to begin fresh."""
    lora = LoRA(4, 6.0, (*THEIRS.targets, "mlp.down"), rslora=True)
    wanted = pretrained.abstract_params(FAMILY, base[1], lora=lora)
    got = adapters.read(str(theirs[0]), lora, "fuyu", base[1], wanted)
    assert got.keys() == {n for n in wanted if ".lora_" in n and ".mlp.down." not in n}
    tensors = load_file(theirs[0] / "adapter_model.safetensors")
    up = "base_model.model.model.language_model.layers.1.mlp.dense_h_to_4h"
    np.testing.assert_array_equal(
        got["decoder.layers.mlp.up.lora_a"][1], tensors[f"{up}.lora_A.weight"].numpy().T
    )
    np.testing.assert_array_equal(
        got["decoder.layers.mlp.up.lora_b"][1], tensors[f"{up}.lora_B.weight"].numpy().T
    )


@pytest.mark.parametrize(
    "run, says",
    [
        (LoRA(8, 6.0, EVERY, rslora=True), ["rank 4", "this run has rank 8", "lora.rank=4"]),
        (LoRA(4, 6.0, EVERY), ["scale 3", "scale 1.5", "lora.rslora=True"]),
        (LoRA(4, 6.0, ("mlp.up",), rslora=True), ["attn.q, attn.k", "targets that include"]),
    ],
)
def test_an_adapter_that_means_something_else_is_refused(base, theirs, run, says):
    with pytest.raises(MMJaxError) as error:
        adapters.read(str(theirs[0]), run, "fuyu", base[1], {})
    for part in (*says, str(theirs[0])):
        assert part in str(error.value)
