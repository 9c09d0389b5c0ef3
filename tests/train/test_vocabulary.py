"""Tokens that a run adds to a model: tables that grow, and what begins in their new rows."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models import converted, registry
from mmjax.models.flamingo.processor import FlamingoProcessor, ProcessorConfig
from mmjax.models.views import MultipliedOut
from mmjax.nn import paths
from mmjax.nn.linear import DTypes
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train import build, initial, state, vocabulary
from mmjax.train import rows as trained_rows
from mmjax.train.design import make_outline
from mmjax.train.rows import Rows, RowSettings
from mmjax.train.settings import LoRASettings, ModelSettings, RunSettings
from mmjax.types import MMJaxError
from tests import small_flamingo

TABLE, HEAD = "decoder.embed.embedding", "decoder.head.kernel"
GROWING = (RowSettings(TABLE, "new"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without <answer> whose tables end with its tokenizer, and its numbers."""
    root = tmp_path_factory.mktemp("model")
    options = ProcessorConfig(image_size=8)
    processor = FlamingoProcessor(options, build_word_tokenizer(small_flamingo.WORDS))
    size = len(processor.tokenizer)
    family = registry.family("flamingo")
    config = family.Config.from_hf(
        {**small_flamingo.hf_config("llama"), **processor.token_ids(), "vocab_size": size}
    )
    with use():
        shapes = nnx.state(
            nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtypes=DTypes()))
        )
    rng = np.random.default_rng(0)
    params = {
        name: rng.normal(size=x.shape).astype(np.float32)
        for name, x in paths.flatten(shapes).items()
    }
    processor.save_pretrained(root / "processor")
    converted.save_model(
        root / "model", params, family=family, config=config, folders=(root / "processor",)
    )
    return root / "model", params, size


def settings(folder, **changes):
    model = ModelSettings(
        family="flamingo", init=str(folder[0]), processor=dict(answer_token=True),
        dtype="float32", frozen_dtype="float32",
    )  # fmt: skip
    return RunSettings(**dict(model=model, train=("cross.*",)) | changes)


def test_tables_grow_and_new_rows_begin_as_the_mean(folder):
    _, params, size = folder
    assert size % 64  # or nothing would have to grow
    run = settings(folder, train_rows=GROWING)
    with use(make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])) as mesh:
        plan = build.blueprint(run.model, run.lora, 0)
        assert plan.new_rows == (size,) and plan.source_rows == size
        assert plan.config.answer_token_id == size
        assert plan.config.vocab_size == -(-size // 64) * 64
        assert type(plan.config).from_hf(plan.config.to_hf()) == plan.config
        outline = make_outline(run, plan.make, mesh)
        train, frozen = initial.init_state(plan, run, outline, mesh)
        rows = trained_rows.resolve(run.train_rows, train.params, plan.processor, plan.new_rows)
    assert rows == {TABLE: Rows(0, (size,))}
    told = trained_rows.describe(rows, plan.processor)
    assert told == {f"rows of {TABLE}": f"{size} <answer>"}
    got = paths.flatten(train.params) | paths.flatten(frozen)
    for name, axis in ((TABLE, 0), (HEAD, 1)):
        value = np.moveaxis(np.asarray(got[name]), axis, 0)
        old = np.moveaxis(params[name], axis, 0)
        np.testing.assert_array_equal(value[:size], old)
        assert len(value) == plan.config.vocab_size
        mean = np.broadcast_to(old.mean(0), value[size:].shape)
        np.testing.assert_allclose(value[size:], mean, atol=1e-6)
    table = paths.flatten(outline.state.params)[TABLE]
    assert got[TABLE].sharding.is_equivalent_to(table.sharding, 2)
    for name in set(got) - {TABLE, HEAD}:
        np.testing.assert_array_equal(got[name], params[name], err_msg=name)


@pytest.mark.parametrize("kind, rows", [("int8", 16), ("nf4", 8)])
def test_a_quantised_head_grows_before_it_is_rounded(folder, kind, rows):
    run = settings(folder, train_rows=GROWING)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, frozen_dtype=kind))
    with use() as mesh:
        plan = build.blueprint(run.model, run.lora, 0, partial(state.chosen_by, run))
        outline = make_outline(run, plan.make, mesh)
        frozen = initial.init_frozen(plan, run, outline, mesh)
    got = paths.flatten(frozen)
    assert got[HEAD].dtype.itemsize == 1 and got[HEAD].shape == (rows, plan.config.vocab_size)
    kernel = MultipliedOut(frozen, "float32").read(HEAD)
    old = folder[1][HEAD]
    want = np.concatenate([old, np.repeat(old.mean(1, keepdims=True), kernel.shape[1], 1)], 1)
    want = want[:, : kernel.shape[1]]
    step = {"int8": 1 / 127, "nf4": 1 - 0.6961928}[kind] * np.abs(want).max(0)
    assert (np.abs(kernel - want) < 0.51 * step).all()


def test_a_frozen_table_is_no_place_for_new_tokens(folder):
    for changes in ({}, dict(train=(), lora=LoRASettings(rank=2))):
        run = settings(folder, **changes)
        plan = build.blueprint(run.model, run.lora, 0)
        tree = nnx.state(nnx.eval_shape(plan.make))
        chosen = state.chosen_by(run, plan.names())
        says = r"<answer> are new to model\.init and decoder\.embed\.embedding is frozen.*'new'"
        with pytest.raises(MMJaxError, match=says):
            vocabulary.check_new_tokens(plan.new_rows, plan.processor, tree, chosen)
        vocabulary.check_new_tokens(plan.new_rows, plan.processor, tree, {*chosen, TABLE})
        vocabulary.check_new_tokens((), plan.processor, tree, chosen)


def test_nothing_grows_unless_an_option_adds_a_token(folder):
    run = settings(folder)
    plain = dataclasses.replace(run.model, processor={})
    plan = build.blueprint(plain, LoRASettings(), 0)
    assert plan.new_rows == () and plan.source_rows is None
    assert plan.config.vocab_size == folder[2] and plan.config.answer_token_id is None
    # A tokenizer that never fitted is of another model, and no table grows for it.
    small = dataclasses.replace(plain, config={"vocab_size": folder[2] - 1})
    with pytest.raises(MMJaxError, match="use the tokenizer the model was trained with"):
        build.blueprint(small, LoRASettings(), 0)


def test_a_table_with_rows_to_spare_keeps_its_size(folder):
    run = settings(folder)
    wide = dataclasses.replace(run.model, config={"vocab_size": 512})
    plan = build.blueprint(wide, LoRASettings(), 0)
    assert plan.config.vocab_size == 512 and plan.source_rows is None
    assert plan.new_rows == (folder[2],) == (plan.config.answer_token_id,)
