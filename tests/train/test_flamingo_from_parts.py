"""A Flamingo that starts from a language model and CLIP: what is theirs, what is fresh."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.config import resolve_recipe
from mmjax.models import opening, pretrained, registry
from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.schema import to_dataclass
from mmjax.train import build, initial, state
from mmjax.train import rows as trained_rows
from mmjax.train.design import make_outline
from mmjax.train.rows import Rows
from mmjax.train.settings import LoRASettings, RunSettings
from mmjax.types import MMJaxError
from tests.parity import flamingo_golden, flamingo_parts

ROOT = Path(__file__).parents[2]
EMBED, HEAD = "decoder.embed.embedding", "decoder.head.kernel"
WORDS = 258  # of the tokenizer
SMALL = dict(
    perceiver_config=dict(num_layers=1, num_heads=2, head_dim=8, num_latents=4, ff_mult=2),
    cross_config=dict(num_heads=2, head_dim=8),
    cross_attn_every_n_layers=2,
)


def write(lm, folder):
    """Write a golden's language model with its own table and a tokenizer, and its CLIP."""
    golden = flamingo_golden.load(flamingo_golden.COMMITTED / f"flamingo_{lm}.npz")
    where = flamingo_parts.write_language_model(golden, folder / "lm")
    file, table = where / "model.safetensors", flamingo_parts.TABLES[lm][0]
    tensors = load_file(file)
    rows = len(tensors[table])
    tensors[table] = np.resize(golden.weights[f"lang_encoder.{table}"][:WORDS], (rows, 32))
    save_file(tensors, file)
    words = {f"w{i}": i for i in range(WORDS)}
    model = {"type": "WordLevel", "unk_token": "w0", "vocab": words}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
    (where / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = {"eos_token": "w1", "unk_token": "w0", "bos_token": "w2"}
    (where / "tokenizer_config.json").write_text(json.dumps(said))
    clip = flamingo_parts.write_clip(golden, folder / "clip.pt")
    return {"lm": str(where), "vision": str(clip), "vision_config": str(clip.with_suffix(".json"))}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("llama"))


def settings(parts, **changes):
    """The published recipe on these parts."""
    recipe = resolve_recipe(f"{ROOT}/configs/openflamingo_3b.py:parts")
    made = to_dataclass(RunSettings, recipe)
    kinds = dict(dtype="float32", frozen_dtype="float32")
    model = dataclasses.replace(made.model, parts=parts, config=SMALL, **kinds)
    return dataclasses.replace(made, model=model, **changes)


def begin(run):
    """The blueprint of a run, what it trains, and the parameters that it begins with."""
    with use(make_mesh({}, jax.devices()[:1])) as mesh:
        plan = build.blueprint(run.model, run.lora, run.seed, partial(state.chosen_by, run))
        outline = make_outline(run, plan.make, mesh)
        told = build.check_fresh(plan, outline.chosen)
        train, frozen = initial.init_state(plan, run, outline, mesh)
        rows = trained_rows.resolve(run.train_rows, train.params, plan.processor, plan.new_rows)
        model = nnx.merge(outline.graphdef, train.params, frozen)
    return plan, told, rows, model


@pytest.mark.heavy
def test_it_starts_as_the_language_model_and_looks_through_clip(llama):
    plan, told, rows, model = begin(settings(llama))
    assert told == {"fresh": "perceiver.*, cross.* start from initial values"}
    c = plan.config
    assert (c.eoc_token_id, c.media_token_id, c.pad_token_id) == (258, 259, 260)
    assert (c.vocab_size, plan.source_rows, plan.new_rows) == (261, 258, (258, 259, 260))
    assert (c.cross_every, c.perceiver.num_latents, c.cross.d_media) == (2, 4, c.vision.d_model)
    assert (plan.processor.config.image_size, c.eos_token_id) == (c.vision.image_size, 1)
    assert rows == {EMBED: Rows(0, (258, 259))}

    language = mmjax.load(llama["lm"])
    own, got = (
        {name: np.asarray(x) for name, x in paths.flatten(nnx.state(one)).items()}
        for one in (language.model, model)
    )
    for name, value in own.items():
        axis = {EMBED: 0, HEAD: 1}.get(name)
        if axis is None:
            np.testing.assert_array_equal(got[name], value, err_msg=name)
            continue
        table, old = np.moveaxis(got[name], axis, 0), np.moveaxis(value, axis, 0)
        np.testing.assert_array_equal(table[:258], old)
        np.testing.assert_allclose(table[258:], np.broadcast_to(old.mean(0), (3, 32)), atol=1e-6)
    fresh = {n: x for n, x in got.items() if n not in own and not n.startswith("vision.")}
    assert {n.split(".")[0] for n in fresh} == {"perceiver", "cross"}
    for name, value in fresh.items():
        assert np.any(value) == (not name.endswith(("gate", "bias"))), name

    rng, (b, t) = np.random.default_rng(0), (2, 12)
    batch = {
        "tokens": rng.integers(0, 258, (b, t), np.int32),
        "positions": np.broadcast_to(np.arange(t, dtype=np.int32), (b, t)),
        "segment_ids": np.ones((b, t), np.int32),
        "visual_index": np.broadcast_to(np.arange(t, dtype=np.int32) // 4 - 1, (b, t)),
        "patches": rng.integers(0, 256, (b, 2, c.patch_dim), np.uint8),
    }
    run = nnx.jit(lambda m, x: m.logits(m(x)), graph=False)
    with use(language.mesh):
        want = np.asarray(run(language.model, {k: v for k, v in batch.items() if k != "patches"}))
        with_media = np.asarray(run(model, batch))
    np.testing.assert_array_equal(with_media[..., :258], want)


def test_a_table_with_rows_to_spare_is_cut_to_the_tokenizer(tmp_path):
    parts = write("mpt", tmp_path)
    opened = opening.open_parts(registry.family("flamingo"), SMALL, **parts)
    assert (opened.config.vocab_size, opened.rows) == (261, None)
    assert opened.reader.shape("lang_encoder.transformer.wte.weight") == (261, 32)
    # OpenFlamingo's sizes where none are stated.
    bare = opening.open_parts(registry.family("flamingo"), {}, **parts).config
    assert (bare.cross_every, bare.perceiver.num_layers, bare.cross.num_heads) == (1, 6, 8)


@pytest.mark.parametrize(
    "parts, says",
    [
        (dict(vision=None), r"needs a language model and a vision tower.*only lm, vision_config"),
        (dict(lm=None), r"model\.parts=\{'lm': DIR, 'vision': FILE_OR_DIR\}.*only vision"),
        (dict(lm="/nowhere"), "--lm /nowhere: .*there is no config.json"),
        (dict(tuning_config="x.json"), "holds no LoRA weights; leave --tuning-config away"),
    ],
)
def test_a_part_that_is_missing_is_named(llama, parts, says):
    given = {k: v for k, v in {**llama, **parts}.items() if v is not None}
    with pytest.raises(MMJaxError, match=says):
        opening.open_parts(registry.family("flamingo"), SMALL, **given)


def test_random_parts_are_neither_frozen_nor_converted(llama):
    adapters = settings(llama, train=(), train_rows=(), lora=LoRASettings(rank=2))
    for run in (adapters, settings(llama, train=("perceiver.*",))):
        says = r"(perceiver|cross)\.\* starts from random numbers.*none of it is trained; train it"
        with pytest.raises(MMJaxError, match=says):
            plan = build.blueprint(run.model, run.lora, 0)
            build.check_fresh(plan, state.chosen_by(run, plan.names()))
    opened = opening.open_parts(registry.family("flamingo"), SMALL, **llama)
    with pytest.raises(MMJaxError, match=r"nothing holds perceiver\.\*, cross\.\*"):
        pretrained.require_trained(opened)


def test_a_part_starts_afresh_where_the_settings_say_so(llama):
    """As of a model that ``init`` names; ``vision`` is frozen, which a random part may not be."""
    run = settings(llama)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, fresh=("vision.*",)))
    plan = build.blueprint(run.model, run.lora, 0)
    assert plan.source.fresh == ("perceiver.*", "cross.*", "vision.*")
    with pytest.raises(MMJaxError, match=r"vision\.\* starts from random numbers.*train it"):
        build.check_fresh(plan, state.chosen_by(run, plan.names()))


def test_the_recipe_plans_without_the_files():
    for name, every in (("3b", 1), ("4b", 2), ("9b", 4)):
        recipe = resolve_recipe(f"{ROOT}/configs/openflamingo_{name}.py:parts")
        model = to_dataclass(RunSettings, recipe).model
        absent = [f"model.parts {part} (set model.parts.{part})" for part in ("lm", "vision")]
        assert build.absent_files(model) == absent
        config = registry.family("flamingo").Config.from_hf(model.plan_config | model.config)
        assert config.cross_every == every and config.vocab_size == 50_280
