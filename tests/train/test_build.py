"""From settings to the parts of a run, and every mistake that is found before a device is used."""

import contextlib
import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.loading import load
from mmjax.models import converted, registry
from mmjax.nn import paths
from mmjax.parallel.mesh import use
from mmjax.train import build, design, initial
from mmjax.train.design import make_outline
from mmjax.train.dropout import dropout_line, with_dropout
from mmjax.train.export import export_model
from mmjax.train.saved import answering
from mmjax.train.settings import DataSettings, LoRASettings, ModelSettings, RunSettings
from mmjax.types import MMJaxError

SIZES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=8
)
MODEL = ModelSettings(config=SIZES, words=("what is it? red", "User: Assistant:"))
NO_LORA = LoRASettings()
ADAPTER = LoRASettings(rank=2, targets=("attn.q", "mlp.up"))
DATA = DataSettings(
    sources={"train": {"kind": "magnifier", "split": "train", "image_size": 32}}, seq_len=64,
    max_patches=48, max_targets=8, batch_size=2,
)  # fmt: skip


def begin(plan, lora=NO_LORA, model=MODEL, freeze=()):
    """The state a run begins with."""
    settings = RunSettings(model=model, lora=lora, freeze=freeze)
    with use() as mesh:
        outline = make_outline(settings, plan.make, mesh)
        return initial.init_state(plan, settings, outline, mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder to begin from, and its numbers."""
    path = tmp_path_factory.mktemp("init") / "model"
    companions = tmp_path_factory.mktemp("companions")
    with use():
        plan = build.blueprint(MODEL, NO_LORA, 7)
        train, _ = begin(plan)
        plan.processor.save_pretrained(companions)
        params = {k: np.asarray(v) + 0.25 for k, v in paths.flatten(train.params).items()}
        converted.save_model(
            path, params, family=registry.family("fuyu"), config=plan.config, folders=(companions,)
        )
    return path, params


def test_a_random_start_takes_sizes_from_the_words():
    plan = build.blueprint(MODEL, NO_LORA, 0)
    assert plan.source is None and plan.lora is None
    assert plan.config.vocab_size % 64 == 0
    assert plan.config.vocab_size >= len(plan.processor.tokenizer)
    assert plan.config.image_token_id == plan.processor.image_token_id
    train, frozen = begin(plan)
    assert not paths.flatten(frozen) and int(train.step) == 0


@pytest.mark.parametrize(
    "slip, meant", [("patch_sise", "patch_size"), ("vocab_sizes", "vocab_size")]
)
def test_a_slip_in_the_models_config_is_named(folder, slip, meant):
    sizes = {k: v for k, v in SIZES.items() if k != meant}
    for init in (None, str(folder[0])):
        model = dataclasses.replace(MODEL, init=init, config=sizes | {slip: 4})
        with pytest.raises(MMJaxError, match=f"model.config has '{slip}', .*: is it '{meant}'"):
            build.blueprint(model, NO_LORA, 0)
    unread = dataclasses.replace(MODEL, config=SIZES | {"image_size": 300})
    assert build.blueprint(unread, NO_LORA, 0).config == build.blueprint(MODEL, NO_LORA, 0).config


def test_values_of_the_models_config_are_laid_over(folder):
    """Our own folders state the decoder's sizes twice, as transformers 5 does, and rotations."""
    given = {"hidden_dropout": 0.25, "layer_norm_eps": 1e-3, "partial_rotary_factor": 1.0}
    given |= {"rope_theta": 5e5, "max_position_embeddings": 99}
    plan = build.blueprint(ModelSettings(init=str(folder[0]), config=given), NO_LORA, 0)
    c = plan.config.decoder
    found = c.residual_dropout, c.norm_eps, c.rope_fraction, c.rope_theta, c.max_positions
    assert found == tuple(given.values())


def test_settings_of_the_processor_are_laid_over():
    model = dataclasses.replace(MODEL, processor={"max_height": 16, "max_width": 24})
    processor = build.blueprint(model, NO_LORA, 0).processor
    assert processor.image_tokens(48, 32) == 2 * (3 + 1)


def test_training_begins_with_the_weights_of_a_folder(folder):
    path, params = folder
    plan = build.blueprint(ModelSettings(init=str(path)), NO_LORA, 0)
    train, _ = begin(plan)
    got = paths.flatten(train.params)
    assert got.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_what_is_fresh_is_not_read_from_the_folder(folder):
    path, params = folder
    model = ModelSettings(init=str(path), fresh=("patch_embed.*",))
    plan = build.blueprint(model, NO_LORA, 0)
    got = paths.flatten(begin(plan, model=model)[0].params)
    assert got.keys() == params.keys()
    kernel, bias = (got[f"patch_embed.{part}"] for part in ("kernel", "bias"))
    assert not np.any(bias) and 0 < np.std(kernel) < 0.1  # the folder's are 0.25 more
    for name in params.keys() - {"patch_embed.kernel", "patch_embed.bias"}:
        np.testing.assert_array_equal(got[name], params[name], err_msg=name)
    told = build.check_fresh(plan, set(plan.names()))
    assert told == {"fresh": "patch_embed.* start from initial values"}
    with pytest.raises(MMJaxError, match="none of it is trained; train it, train="):
        build.check_fresh(plan, {"decoder.head.kernel"})


def test_adapters_begin_fresh_beside_frozen_weights_of_a_folder(folder):
    path, params = folder
    model = ModelSettings(init=str(path))
    train, frozen = begin(build.blueprint(model, ADAPTER, 0), ADAPTER, model)
    adapters, rest = paths.flatten(train.params), paths.flatten(frozen)
    assert {n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1] for n in adapters} == {
        "q.lora_a", "q.lora_b", "up.lora_a", "up.lora_b"
    }  # fmt: skip
    for name, value in adapters.items():
        assert value.dtype == jnp.float32
        assert np.any(value) == name.endswith("lora_a"), name
    for name, value in params.items():
        assert rest[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(rest[name], jnp.asarray(value, jnp.bfloat16), err_msg=name)


@pytest.mark.heavy
def test_frozen_parameters_of_a_random_start_have_their_own_dtype():
    plan = build.blueprint(MODEL, NO_LORA, 0)
    train, frozen = begin(plan, freeze=("decoder.embed.*",))
    assert {str(x.dtype) for x in paths.flatten(frozen).values()} == {"bfloat16"}
    assert {str(x.dtype) for x in paths.flatten(train.params).values()} == {"float32"}


@pytest.mark.parametrize(
    "model, lora, says",
    [
        (dict(words=()), {}, ["model.words", "model.init"]),
        (dict(family="fuyo"), {}, ["'fuyo' is unknown", "did you mean 'fuyu'"]),
        (dict(init="/nowhere/fuyu"), {}, ["/nowhere/fuyu: no such file or folder"]),
        (dict(attention="flash"), {}, ["model.attention is 'flash'", "auto, xla, triton"]),
        (dict(attention="cudnn"), {}, ['model.attention is "cudnn"', "needs a CUDA GPU", '"auto"']),
        (dict(residual_dropout=1.0), {}, ["model.residual_dropout is 1.0", "below 1"]),
        (dict(remat="most"), {}, ["model.remat is 'most'", "names"]),
        (dict(scan_unroll=0), {}, ["model.scan_unroll is 0", "1 or more"]),
        (dict(dtype="flaot32"), {}, ["model.dtype is 'flaot32'; did you mean 'float32'"]),
        (dict(param_dtype="fp16"), {}, ["model.param_dtype is 'fp16'", "bfloat16, float32"]),
        ({}, dict(rank=2, targets=("attn.z",)), ["'attn.z'", "attn.q", "mlp.up"]),
    ],
)
def test_mistakes_are_named(model, lora, says):
    with pytest.raises(MMJaxError) as error:
        build.blueprint(
            dataclasses.replace(MODEL, **model), dataclasses.replace(NO_LORA, **lora), 0
        )
    for part in says:
        assert part in str(error.value)


def test_a_decoder_in_training_has_ranges_which_cudnn_does_not_know(monkeypatch):
    monkeypatch.setattr(build.implementations, "capability", lambda: 9.0)
    for name in ("auto", "xla", "triton"):
        build.check_attention(dataclasses.replace(MODEL, attention=name), ranges=True)
    with pytest.raises(MMJaxError, match="have ranges of keys"):
        build.check_attention(dataclasses.replace(MODEL, attention="cudnn"), ranges=True)


def test_settings_say_what_is_dropped_and_the_config_stays_as_it_was():
    model = dataclasses.replace(MODEL, residual_dropout=0.25)
    plan = build.blueprint(model, NO_LORA, 0)
    made = nnx.eval_shape(plan.make)
    assert (made.decoder.layers.dropout, made.decoder.dropout) == (0.25, 0.0)
    assert plan.config.decoder.residual_dropout == 0.0
    assert dropout_line(with_dropout(plan.config, model)) == {"dropout": "residual 0.25"}
    assert dropout_line(plan.config) == {}
    stated = with_dropout(plan.config, dataclasses.replace(model, embedding_dropout=0.5))
    back = with_dropout(stated, dataclasses.replace(MODEL, residual_dropout=0.0))
    assert (back.decoder.residual_dropout, back.decoder.embedding_dropout) == (0.0, 0.5)


def test_rows_longer_than_the_table_of_positions_are_refused_before_all_else():
    sizes = dict(
        model_type="opt", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8,
        max_position_embeddings=64, vocab_size=8,
    )  # fmt: skip
    model = ModelSettings(family="language", config=sizes, words=("what is it? red",))
    for length in (64, 65):
        data = dataclasses.replace(DATA, seq_len=length)
        with use() as mesh, contextlib.ExitStack() as stack:
            if length > 64:
                said = "data.seq_len is 65, .* positions for 64 tokens.*set data.seq_len to 64"
                stack.enter_context(pytest.raises(MMJaxError, match=said))
            design.make_design(RunSettings(model=model, data=data), mesh)


def test_a_run_asks_its_model_as_its_export_is_asked(folder, tmp_path):
    """Of an instruction-tuned model generation_config.json tells the end of a turn."""
    path = shutil.copytree(folder[0], tmp_path / "model")
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 7, 4000]}')
    plan = build.blueprint(ModelSettings(init=str(path)), NO_LORA, 0)
    asked = answering(plan, None, None, RunSettings())
    assert asked.end_tokens() == (plan.config.eos_token_id, 5, 7)
    assert asked.template == "fuyu_prompt"
    otherwise = RunSettings(data=DataSettings(template={"a": "fuyu_chat", "b": "simple_chat"}))
    random = answering(build.blueprint(MODEL, NO_LORA, 0), None, None, otherwise)
    assert random.ends == () and random.template is None


def test_an_export_ends_its_answers_as_the_run_did(folder, tmp_path):
    """The end of a turn, which config.json cannot state beside the end of a text."""
    path = shutil.copytree(folder[0], tmp_path / "model")
    said = {"max_length": 99, "do_sample": True, "temperature": 0.6, "_from_model_config": True}
    ids = {"bos_token_id": 3, "eos_token_id": [5, 7]}
    (path / "generation_config.json").write_text(json.dumps(said | ids))
    loaded = load(path)
    export_model(loaded, tmp_path / "run", None, set())
    again, own = load(tmp_path / "run"), loaded.processor.token_ids()
    assert again.end_tokens() == loaded.end_tokens() and {5, 7} < set(loaded.end_tokens())
    assert again.generation == {
        "max_length": 99, "do_sample": True, "temperature": 0.6,  # what a user in PyTorch gets
        "bos_token_id": own["bos_token_id"], "pad_token_id": own["pad_token_id"],
        "eos_token_id": list(loaded.end_tokens()),
    }  # fmt: skip
    plan = build.blueprint(ModelSettings(init=str(path)), NO_LORA, 0)
    assert answering(plan, None, None, RunSettings()).generation == said | ids
    export_model(load(folder[0]), tmp_path / "plain", None, set())
    assert not (tmp_path / "plain/generation_config.json").exists()


def test_batches_come_in_the_shape_the_settings_say(tmp_path):
    plan = build.blueprint(MODEL, NO_LORA, 0)
    batches = build.train_iterator(RunSettings(data=DATA), plan.processor, tmp_path)
    batch = next(batches)
    batches.close()
    assert batch["tokens"].shape == (2, 64) and batch["target_index"].shape == (2, 8)
    assert batch["patches"].shape == (2, 48, 8 * 8 * 3) and batch["patches"].dtype == np.uint8


@pytest.mark.parametrize(
    "change, accumulate, says",
    [
        (dict(sources={}), 1, "data.sources is empty"),
        (dict(sources={"a": {"kind": "jsn", "path": "x"}}), 1, "'jsn' is unknown"),
        (
            dict(sources={"a": {"kind": "json", "file": "x"}}),
            1,
            "there is no setting 'file'; kind 'json' takes path",
        ),
        (dict(max_bad_share=5.0), 1, "max_bad_share 5.0 is a share"),
        (dict(template="fuyu_chatt"), 1, "fuyu_chat"),
    ],
)
def test_mistakes_in_the_data_are_named(tmp_path, change, accumulate, says):
    plan = build.blueprint(MODEL, NO_LORA, 0)
    settings = RunSettings(data=dataclasses.replace(DATA, **change), accumulate=accumulate)
    with pytest.raises(MMJaxError) as error:
        build.train_iterator(settings, plan.processor, tmp_path)
    assert says in str(error.value)
