"""One step, one checkpoint and one answer of instruct_flamingo's own code, beside ours."""

import dataclasses
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx

import mmjax
from mmjax.generate.loop import pad_batch
from mmjax.models import registry
from mmjax.nn import paths
from mmjax.train import build, state, tuning
from mmjax.train.settings import LoRASettings, ModelSettings, RunSettings
from mmjax.weights import rules
from mmjax.weights.tuning import module_of
from mmjax.weights.writer import Arrays
from tests import small_flamingo
from tests.parity import backward, flamingo_golden, flamingo_parts, flamingo_peer, forward

FOLDER = Path(os.environ.get("CLEVER_GOLDENS", flamingo_golden.COMMITTED))
MODULE = "module.lang_encoder.base_model.model."  # before a name of the language model
FAMILY = registry.family("flamingo")


@dataclasses.dataclass(frozen=True)
class Peer:
    """The golden's arrays by name, and those of each group by the checkpoint's names."""

    arrays: dict
    weights: dict
    gradients: flamingo_golden.Golden

    def __getitem__(self, name):
        value = self.arrays[name]
        return json.loads(value.item()) if value.dtype.kind == "U" else value


@pytest.fixture(scope="module")
def mpt():
    return flamingo_golden.load(flamingo_golden.COMMITTED / "flamingo_mpt.npz")


@pytest.fixture(scope="module")
def peer(mpt):
    groups = defaultdict(dict)
    with np.load(FOLDER / "clever_model.npz") as file:
        for key in file.files:
            group, slash, name = key.partition("/")
            groups[group if slash else ""][name if slash else key] = file[key]
    weights = {k: v * np.float32(flamingo_golden.W8_STEP) for k, v in groups["w8"].items()}
    norms = {k: float(v) for k, v in groups["gn"].items()}
    gradients = dict(gradients=groups["g"], gradient_norms=norms, gradient_samples=groups["gs"])
    return Peer(groups[""], weights, dataclasses.replace(mpt, **gradients))


@pytest.fixture(scope="module")
def ours(mpt, peer, tmp_path_factory):
    """The checkpoint that the peer saved, over the OpenFlamingo that it began with."""
    folder = FOLDER
    if (folder / "clever.pt").exists():  # the file itself, made just now
        parts = dict(lm=folder / "lm", vision=folder / "tower.pt")
        parts["vision_config"] = folder / "towers/ViT-28-tiny.json"
        return load(folder, parts)
    folder = tmp_path_factory.mktemp("clever")
    parts = flamingo_parts.write_parts(mpt, folder)
    table = mpt.weights["lang_encoder.transformer.wte.weight"]
    saved = {**peer.weights, f"{MODULE}lm_head.weight": table}  # tied: the filter does not see it
    assert {k: list(v.shape) for k, v in saved.items()} == peer["keys"]
    whole = flamingo_parts.tensors(saved)
    trained = [torch.nn.Parameter(v) for k, v in whole.items() if "lm_head" not in k]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    run = dict(epoch=0, model_state_dict=whole, optimizer_state_dict=optimizer.state_dict(),
               lr_scheduler_state_dict=scheduler.state_dict())  # fmt: skip
    torch.save(run, folder / "clever.pt")
    (folder / "tuning.json").write_text(json.dumps(peer["tuning"]))
    return load(folder, parts)


def load(folder, parts):
    chain = f"{folder / 'checkpoint.pt'},{folder / 'clever.pt'}"
    return mmjax.load(chain, **parts, tuning_config=folder / "tuning.json")


@pytest.mark.heavy
def test_the_same_parameters_are_trained(mpt, peer, tmp_path):
    """Whole ones by name and number; adapters by the modules that they stand in."""
    config = FAMILY.Config.from_hf(flamingo_peer.config_json(mpt))
    model = ModelSettings(
        family="flamingo", config=flamingo_peer.config_json(mpt), words=small_flamingo.WORDS
    )
    assert len(peer["trained"]) == 3
    for published, theirs in peer["trained"].values():
        file = tmp_path / "tuning.json"
        file.write_text(json.dumps(published))
        settings = RunSettings(model=model, lora=LoRASettings(tuning_config=str(file)))
        settings, _ = tuning.applied(settings)
        plan = build.blueprint(settings.model, settings.lora, 0)
        leaves = paths.flatten(nnx.state(nnx.eval_shape(plan.make)))
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        names = state.chosen_by(settings, plan.names())
        whole = Counter()  # a map that is one of several in a tensor counts its part
        for rule in FAMILY.weights.rules(config, "openflamingo"):
            if rule.ours in names:
                for key in rule.keys(shapes[rule.ours]):
                    whole[key] += int(np.prod(rule.inner(shapes[rule.ours])))
        assert whole == {k: v for k, v in theirs.items() if "lora_" not in k}
        adapted = {
            module_of(dataclasses.replace(rule, theirs=key))
            for rule in FAMILY.weights.tuning(config).adapted
            if rule.ours.removesuffix("kernel") + "lora_a" in names
            for key in rule.keys(shapes[rule.ours])
        }
        modules = {k.split(".lora_")[0] for k in theirs if "lora_" in k}
        prefix = "lang_encoder.base_model.model."
        assert adapted == {m.replace(prefix, "lang_encoder.") for m in modules}


def batch_of(peer, image):
    """Return the batch of the peer's step, with its targets."""
    rows = []
    for ids, mask, vision in zip(
        peer["input_ids"], peer["attention_mask"], peer["vision_x"], strict=True
    ):
        ids = np.where(mask, ids, 0)
        rows.append(flamingo_peer.example(ids, vision, image))
    batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    batch["segment_ids"] = peer["attention_mask"].astype(np.int32)
    targets = [np.flatnonzero(row != -100) for row in peer["labels"]]
    backward.place_targets(batch, targets)
    return batch


def test_logits_of_the_checkpoint_it_saved(mpt, peer, ours):
    batch = batch_of(peer, mpt.config["ids"]["image"])
    got, where = forward.logits(ours, batch), peer["attention_mask"]
    np.testing.assert_allclose(got[where], peer["logits"][where], atol=1e-4)


def test_loss_and_gradients_of_its_step(mpt, peer, ours):
    batch = batch_of(peer, mpt.config["ids"]["image"])
    value, flat = backward.loss_and_gradients(ours, batch)
    assert value == pytest.approx(float(peer["loss"]), rel=1e-5)
    named = in_their_names(ours.config, flat)
    assert set(named) >= set(peer.gradients.trained) and len(peer.gradients.trained) == 121
    errors = peer.gradients.gradient_errors(named)
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda x: -x[1])[:5]


def in_their_names(config, flat):
    """Return gradients by the checkpoint's names; A of a fused map is one for all of its parts."""
    whole = {k: v for k, v in flat.items() if "lora_" not in k}
    table = FAMILY.weights.rules(config, "openflamingo")
    named = {f"module.{t.key}": t.make() for t in rules.export(table, Arrays(whole))}
    parts = defaultdict(list)
    for rule in FAMILY.weights.tuning(config).adapted:
        stem = rule.ours.removesuffix("kernel")
        if f"{stem}lora_a" in flat:
            a, b = flat[f"{stem}lora_a"], flat[f"{stem}lora_b"]
            for i, key in enumerate(rule.keys(a.shape)):
                parts[key].append((a[i].reshape(-1, 4).T, b[i].reshape(4, -1).T))
    for key, pairs in parts.items():
        stem = key.removesuffix(".weight").replace("lang_encoder.", MODULE)
        named[f"{stem}.lora_A.default.weight"] = sum(a for a, _ in pairs)
        named[f"{stem}.lora_B.default.weight"] = np.concatenate([b for _, b in pairs])
    return named


@pytest.mark.heavy
def test_its_answer_forgets_the_image_behind_the_first_token(mpt, peer, ours):
    """Through PEFT the peer marks the media as cached on the wrapper, which its layers never ask.

    Its text is ours if no token but the prompt's looks at an image; ours is that of whole forwards.
    """
    ids, vision = peer["prompt_ids"][0], peer["prompt_vision"][0]
    prompt = flamingo_peer.example(ids, vision, mpt.config["ids"]["image"])
    got = ours.generate_tokens([prompt], max_new_tokens=12)[0]
    np.testing.assert_array_equal(got, peer["right"])
    whole = np.concatenate([ids, peer["answer"]])
    longer = flamingo_peer.example(whole, vision, mpt.config["ids"]["image"])
    batch, _ = pad_batch([longer])
    n = len(whole)
    seeing = forward.logits(ours, batch)[0].argmax(-1)[len(ids) - 1 : n - 1]
    batch["visual_index"][:, len(ids) :] = -1
    blind = forward.logits(ours, batch)[0].argmax(-1)[len(ids) - 1 : n - 1]
    np.testing.assert_array_equal(blind, peer["answer"])
    assert seeing[0] == blind[0] and (seeing != blind).any()
