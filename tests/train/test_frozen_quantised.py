"""A frozen base in int8 or nf4: what is rounded, and that the rest trains beside it."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.loaded import LoadedModel
from mmjax.models import converted, registry
from mmjax.models.views import MultipliedOut
from mmjax.nn import paths, quantized
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train import build, frozen, initial, optim
from mmjax.train import state as train_state
from mmjax.train.design import make_outline
from mmjax.train.evaluation import count_parameters
from mmjax.train.loss import loss_sum
from mmjax.train.plan import make_plan
from mmjax.train.settings import LoRASettings, ModelSettings, RunSettings
from mmjax.train.step import make_train_step
from mmjax.types import MMJaxError
from mmjax.weights.store import StoreReader
from tests import tiny

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=4
)
KINDS = {"int8": "int8", "nf4": "uint8"}
MODEL = ModelSettings(config=SIZES, words=("what",), dtype="float32", frozen_dtype="int8")
LORA = LoRASettings(rank=2, targets=("attn.*",))


def made(settings):
    """Return (graphdef, trained, frozen, plan) of a run that starts from random weights."""
    plan = build.blueprint(
        settings.model, settings.lora, 0, lambda names: train_state.chosen_by(settings, names)
    )
    mesh = make_mesh({}, jax.devices()[:1])
    outline = make_outline(settings, plan.make, mesh)
    state, rest = initial.init_state(plan, settings, outline, mesh)
    return outline.graphdef, state.params, rest, plan


@functools.cache
def base(kind):
    """Return (graphdef, trained, frozen, plan) of adapters over kernels of a kind."""
    model = dataclasses.replace(MODEL, frozen_dtype=kind)
    with use(make_mesh({}, jax.devices()[:1])):
        return made(RunSettings(model=model, lora=LORA))


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.heavy), "nf4"])
def test_frozen_kernels_are_quantised_and_adapters_train_beside_them(kind):
    graphdef, params, rest, _ = base(kind)
    kinds = {name: x.dtype.name for name, x in paths.flatten(rest).items()}
    kernels = {n for n in kinds if n.endswith(".kernel")}
    assert len(kernels) == 8 and {kinds[n] for n in kernels} == {KINDS[kind]}
    assert {kinds[f"{n}_scale"] for n in kernels} == {"float32"}
    others = {k for n, k in kinds.items() if not n.endswith((".kernel", ".kernel_scale"))}
    assert others == {"bfloat16"}
    assert all(n.endswith(("lora_a", "lora_b")) for n in paths.flatten(params))
    # The numbers that the kernels stand for, in a model whose kernels are not quantised.
    plain_def, plain_params, plain_rest, _ = base("float32")
    with use(make_mesh({}, jax.devices()[:1])):
        whole = MultipliedOut(rest, "float32")
        plain_rest = paths.replace(plain_rest, {n: whole.read(n) for n in whole.keys()})  # noqa: SIM118
        plain_params = paths.replace(plain_params, paths.flatten(params))
        grads = [
            jax.jit(jax.grad(lambda p, g=g, r=r: loss_sum(nnx.merge(g, p, r), tiny.batch())[0]))(p)
            for g, p, r in ((graphdef, params, rest), (plain_def, plain_params, plain_rest))
        ]
    for (name, ours), theirs in zip(
        paths.flatten(grads[0]).items(), paths.flatten(grads[1]).values(), strict=True
    ):
        loose = dict(rtol=1e-3, atol=1e-4) if kind == "int8" else dict(rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours, theirs, **loose, err_msg=name)
    assert max(np.abs(x).max() for x in paths.flatten(grads[0]).values()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_multiplied_out_a_layer_at_a_time(kind, monkeypatch, tmp_path):
    """As an exported model is written; all of them at once may be more than a device holds."""
    _, _, rest, plan = base(kind)
    reader = MultipliedOut(rest, "bfloat16")
    made, real = [], quantized.Kernel.dequantize

    def dequantize(*given):
        made.append(real(*given))
        return made[-1]

    monkeypatch.setattr(quantized.Kernel, "dequantize", dequantize)
    name, flat = "decoder.layers.mlp.up.kernel", "patch_embed.kernel"
    assert (reader.shape(name), reader.shape(flat)) == ((2, 32, 64), (48, 32))
    assert reader.dtype(name) == jax.numpy.bfloat16
    whole = reader.read(name)
    pieces = [reader.read(name, (slice(i, i + 1), slice(0, 32), slice(5, 9))) for i in (0, 1)]
    assert [x.shape for x in made] == [(2, 32, 64), (1, 32, 64), (1, 32, 64)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole[..., 5:9])
    made.clear()
    halves = [reader.read(flat, (slice(i, i + 24), slice(0, 32))) for i in (0, 24)]
    np.testing.assert_array_equal(np.concatenate(halves), reader.read(flat))
    assert len(made) == 1  # without layers, kept from slice to slice
    family = registry.family("fuyu")
    converted.save_model(tmp_path / "model", reader, family=family, config=plan.config)
    stored = StoreReader(tmp_path / "model" / converted.PARAMS)
    assert set(stored.keys()) == {n for n in paths.flatten(rest) if not n.endswith("_scale")}
    np.testing.assert_array_equal(stored.read(name), whole)


@pytest.mark.heavy
def test_adapters_learn_over_an_nf4_base_that_does_not_move():
    graphdef, params, rest, _ = base("nf4")
    before = jax.device_get(paths.flatten(rest))
    settings = optim.OptimSettings(lr=1e-2, warmup=0, schedule="constant")
    tx = optim.make_optimizer(settings, 10)
    with use(make_mesh({}, jax.devices()[:1])):
        step = jax.jit(make_train_step(graphdef, tx, optim.schedule(settings, 10)))
        state = train_state.TrainState(np.int32(0), params, tx.init(params))
        losses = []
        for _ in range(6):
            state, metrics = step(state, rest, tiny.batch())
            losses.append(float(metrics["loss"]))
    assert all(b < a for a, b in itertools.pairwise(losses)) and losses[-1] < losses[0] - 0.05
    for name, value in paths.flatten(rest).items():
        assert before[name].tobytes() == np.asarray(value).tobytes(), name


@pytest.mark.heavy
def test_the_plan_counts_four_and_a_half_bits_a_weight():
    def planned(kind):
        run = RunSettings(model=dataclasses.replace(MODEL, frozen_dtype=kind), lora=LORA)
        return make_plan(run, jax.devices()[:1])

    whole, nf4 = planned("bfloat16"), planned("nf4")
    assert whole.parameters == nf4.parameters
    d, f, patch, layers, v = 32, 64, 48, 2, base("nf4")[3].config.vocab_size
    weights = layers * (4 * d * d + 2 * d * f) + patch * d + v * d
    maxima = layers * (5 * d + f) + d + v  # no map has more than 64 inputs: one for each output
    assert whole.most("frozen") - nf4.most("frozen") == 2 * weights - weights / 2 - 4 * maxima
    assert (whole.most("multiplied"), nf4.parts["multiplied"][0]) == (0, v * d * 4)
    assert nf4.most("kept") <= whole.most("kept")  # no kernel is kept multiplied out


def test_a_report_counts_weights_and_not_their_bytes_and_scales():
    def count(kind):
        graphdef, params, rest, plan = base(kind)
        model = nnx.merge(graphdef, params, rest)
        return count_parameters(LoadedModel("fuyu", plan.config, model, plan.processor, None))

    assert count("nf4") == count("int8") == count("float32")


def test_an_unknown_dtype_is_refused():
    says = "model.frozen_dtype is 'fp4'; did you mean 'nf4'.*one of bfloat16"
    with pytest.raises(MMJaxError, match=says):
        base("fp4")


def test_trained_kernels_stay_whole():
    settings = RunSettings(model=MODEL, freeze=("decoder.layers.*",))
    with use(make_mesh({}, jax.devices()[:1])):
        _, params, rest, _ = made(settings)
    assert paths.flatten(params)["patch_embed.kernel"].dtype == np.float32
    assert paths.flatten(rest)["decoder.layers.attn.q.kernel"].dtype == np.int8


@pytest.mark.heavy
def test_some_kernels_alone_are_rounded():
    """As the peers' 4-bit bases: the language model, and what pictures pass through stays whole."""
    model = dataclasses.replace(MODEL, quantize=("decoder.*",))
    with use(make_mesh({}, jax.devices()[:1])):
        rest = made(RunSettings(model=model, lora=LORA))[2]
    kinds = {name: x.dtype.name for name, x in paths.flatten(rest).items()}
    assert kinds["patch_embed.kernel"] == "bfloat16" and "patch_embed.kernel_scale" not in kinds
    rounded = {n for n, kind in kinds.items() if kind == "int8"}
    assert rounded == {n for n in kinds if n.startswith("decoder.") and n.endswith(".kernel")}
    with pytest.raises(MMJaxError, match=r"quantize pattern 'visoin\.\*' matches no kernel.* look"):
        frozen.quantized_maps(["vision.a.kernel"], set(), "int8", ("visoin.*",))
    # A part that is trained whole is no slip of the pen.
    names, some = ["a.b.kernel", "c.kernel"], ("a.*", "c.*")
    assert frozen.quantized_maps(names, {"a.b.kernel"}, "int8", some) == ("c",)


def test_where_every_kernel_is_trained_there_is_nothing_to_round():
    with pytest.raises(MMJaxError, match="every kernel is trained; set it to bfloat16"):
        frozen.quantized_maps(["a.kernel", "b.bias"], {"a.kernel"}, "int8")
