"""Fuyu: its size, its FLOPs, where patches go, and a loss that never sees padding."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.generate.loop import pad_batch
from mmjax.models.decoder import DecoderConfig
from mmjax.models.fuyu.model import Fuyu, FuyuConfig
from mmjax.models.fuyu.processor_config import ProcessorConfig
from mmjax.models.work import forward_flops
from mmjax.nn import paths
from mmjax.nn.linear import LoRA
from mmjax.train.loss import loss_sum
from mmjax.types import MMJaxError
from tests import tiny


@pytest.fixture(scope="module")
def model():
    from mmjax.parallel.mesh import use

    with use():
        return tiny.model()


@jax.jit
def run(parts, batch):
    model = nnx.merge(*parts)
    return model.logits(model(batch))


def logits(model, batch):
    return np.asarray(run(nnx.split(model), batch))


def shapes(config, **kwargs):
    made = nnx.eval_shape(lambda: Fuyu(config, rngs=nnx.Rngs(0), **kwargs))
    return {k: v.shape for k, v in paths.flatten(nnx.state(made)).items()}


def test_the_full_size_has_9_408_238_592_parameters():
    found = shapes(FuyuConfig())
    assert sum(int(np.prod(s)) for s in found.values()) == 9_408_238_592
    assert found["decoder.layers.attn.q.kernel"] == (36, 4096, 64, 64)
    assert found["decoder.layers.mlp.down.kernel"] == (36, 16384, 4096)
    assert found["decoder.head.kernel"] == (4096, 262144)
    assert found["patch_embed.kernel"] == (2700, 4096)
    assert "decoder.head.bias" not in found


def test_adapters_stand_beside_the_kernels_they_change():
    targets = ("attn.q", "attn.o", "mlp.up", "head", "patch_embed")
    found = shapes(tiny.CONFIG, lora=LoRA(3, 6.0, targets))
    added = {k: s for k, s in found.items() if ".lora_" in k}
    assert added == {
        "decoder.layers.attn.q.lora_a": (2, 32, 3),
        "decoder.layers.attn.q.lora_b": (2, 3, 4, 8),
        "decoder.layers.attn.o.lora_a": (2, 4, 8, 3),
        "decoder.layers.attn.o.lora_b": (2, 3, 32),
        "decoder.layers.mlp.up.lora_a": (2, 32, 3),
        "decoder.layers.mlp.up.lora_b": (2, 3, 64),
        "decoder.head.lora_a": (32, 3),
        "decoder.head.lora_b": (3, 64),
        "patch_embed.lora_a": (48, 3),
        "patch_embed.lora_b": (3, 32),
    }


def test_flops_are_those_the_compiler_counts():
    """One layer: the compiler counts the body of a scan once, whatever its length."""
    decoder = DecoderConfig(
        vocab_size=512, d_model=256, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64,
        d_mlp=1024,
    )  # fmt: skip
    config = FuyuConfig(decoder=decoder, patch_size=8)
    b, t = 2, 64
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Fuyu(config, rngs=nnx.Rngs(0))))
    batch = {k: np.zeros((b, t), np.int32) for k in ("tokens", "positions", "visual_index")}
    batch["segment_ids"] = np.ones((b, t), np.int32)
    batch["patches"] = np.zeros((b, t, config.patch_dim), np.uint8)  # as many as tokens
    cost = run.lower((graphdef, params), batch).compile().cost_analysis()
    want = b * forward_flops(config.work(t, visual=t, width=config.patch_dim))
    np.testing.assert_allclose(want, cost["flops"], rtol=0.1)


@pytest.mark.parametrize("layers", [pytest.param(1, marks=pytest.mark.heavy), 3])
def test_states_at_asked_positions_are_those_of_the_whole(layers, monkeypatch):
    """The last layer trimmed or not, packed rows, an index twice, gradients too."""
    config = dataclasses.replace(
        tiny.CONFIG, decoder=dataclasses.replace(tiny.CONFIG.decoder, num_layers=layers)
    )
    batch = tiny.batch()
    batch["segment_ids"][:, 9:] = 2
    at = np.random.default_rng(0).integers(batch["tokens"].shape[1], size=(len(batch["tokens"]), 5))
    at[:, 1] = at[:, 0]
    graphdef, params = nnx.split(Fuyu(config, rngs=nnx.Rngs(0)))

    def states(params, trim, at):
        monkeypatch.setattr("mmjax.models.decoder.TRIM_LIMIT", 2**25 if trim else 0)
        out = nnx.merge(graphdef, params)(batch, at)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(states, has_aux=True), static_argnums=1)
    (_, whole), _ = run(params, False, None)
    found = {trim: run(params, trim, at) for trim in (True, False)}
    (_, cut), grads = found[True]
    np.testing.assert_allclose(cut, np.take_along_axis(whole, at[..., None], 1), atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(found[False][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


def test_the_last_layer_of_a_small_model_is_cut_down_to_half_a_row_at_most():
    decoder = dataclasses.replace(tiny.CONFIG.decoder, num_layers=2)
    whole, half, most = (decoder.work(64, asked=share)[1].scores for share in (1.0, 0.5, 0.75))
    assert (half, most) == (0.75 * whole, whole)


def test_flops_of_fuyu_8b():
    config = FuyuConfig()
    # Two for each weight that multiplies; embeddings and norms are looked up or cheap.
    matmuls = 2 * (9_408_238_592 - 262_144 * 4096)
    one = forward_flops(config.work(1, visual=1, width=config.patch_dim))
    assert one == pytest.approx(matmuls, rel=1e-3)
    head = 2 * 262_144 * 4096

    def a_token(tokens, asked=1.0):
        return forward_flops(config.work(tokens, asked=asked)) / tokens

    assert a_token(1024) - a_token(1024, asked=0.25) == pytest.approx(0.75 * head)
    longer = a_token(2048) - a_token(1024)
    assert longer == pytest.approx(36 * 2 * 2 * 4096 * 512)  # scores and values, 512 keys more


def test_flops_of_a_model_that_trims_its_last_layer():
    config = tiny.CONFIG
    last = 2 * (2 * 32 * 32 + 2 * 32 * 64 + 2 * 32 * 8.5)  # all but keys and values
    whole, quarter = (forward_flops(config.work(16, asked=asked)) for asked in (1.0, 0.25))
    assert whole - quarter == pytest.approx(16 * 0.75 * (2 * 64 * 32 + last))


def test_grey_levels_and_normalised_floats_give_the_same_logits(model):
    batch = tiny.batch(b=2)
    floats = (batch["patches"].astype(np.float32) / 255 - 0.5) / 0.5
    got = logits(model, {**batch, "patches": floats})
    np.testing.assert_allclose(got, logits(model, batch), atol=1e-4)


def test_each_patch_stands_where_the_index_points(model):
    batch = jax.tree.map(jnp.asarray, tiny.batch(b=2, t=16, p=3))
    visual = np.full((2, 16), -1, np.int32)
    visual[0, [2, 7, 5]] = [2, 0, 1]  # any order, any place, one row without
    batch["visual_index"] = jnp.asarray(visual)
    x = np.asarray(model.embed(batch))
    patches = np.asarray(model.patch_embed(model.normalize(batch["patches"])))
    for place, row in ((2, 2), (7, 0), (5, 1)):
        np.testing.assert_allclose(x[0, place], patches[0, row], atol=1e-5)
    words = np.asarray(model.decoder.embed.embedding[...])[np.asarray(batch["tokens"])]
    text = visual < 0
    np.testing.assert_array_equal(x[text], words[text])


def test_patches_that_nothing_points_at_change_nothing(model):
    batch = tiny.batch(b=2)
    more = np.concatenate([batch["patches"], np.full((2, 5, 48), 200, np.uint8)], axis=1)
    np.testing.assert_array_equal(logits(model, {**batch, "patches": more}), logits(model, batch))


def test_text_alone_needs_no_patches(model):
    batch = tiny.batch(b=2, p=0)
    without = {k: v for k, v in batch.items() if k != "patches"}
    want = logits(model, without)
    np.testing.assert_array_equal(logits(model, batch), want)  # patches of shape [2, 0, 48]
    padding = np.zeros((2, 4, 48), np.uint8)
    np.testing.assert_array_equal(logits(model, {**without, "patches": padding}), want)


def test_samples_packed_in_one_row_do_not_see_each_other(model):
    rng = np.random.default_rng(3)
    first, second = tiny.example(rng, 9, 3), tiny.example(rng, 12, 4)
    alone = [logits(model, pad_batch([e])[0])[0, : len(e["tokens"])] for e in (first, second)]
    row = pad_batch([first])[0]
    row["patches"] = np.concatenate([first["patches"], second["patches"]])[None]
    at = slice(9, 21)
    row["tokens"][0, at] = second["tokens"]
    row["positions"][0, at] = second["positions"]
    row["segment_ids"][0, at] = 2
    row["visual_index"][0, at] = np.where(
        second["visual_index"] >= 0, second["visual_index"] + 3, -1
    )
    packed = logits(model, row)[0]
    np.testing.assert_allclose(packed[:9], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[at], alone[1], atol=1e-5)


def test_the_loss_is_the_mean_over_targets_alone(model):
    batch = tiny.batch(b=4)
    total, count = jax.jit(lambda p, b: loss_sum(nnx.merge(*p), b, chunk=3))(
        nnx.split(model), batch
    )
    log_p = jax.nn.log_softmax(logits(model, batch))
    places = [(r, i) for r in range(4) for i in batch["target_index"][r] if i > 0]
    want = -sum(float(log_p[r, i - 1, batch["tokens"][r, i]]) for r, i in places)
    assert count == len(places) == 14
    np.testing.assert_allclose(total, want, rtol=1e-5)


def test_a_config_comes_back_from_its_file():
    decoder = dataclasses.replace(
        tiny.CONFIG.decoder, rope_theta=500.0, norm_eps=1e-6, qk_norm="none", rope_fraction=0.25
    )
    config = dataclasses.replace(tiny.CONFIG, decoder=decoder, bos_token_id=3, pad_token_id=2)
    assert FuyuConfig.from_hf(config.to_hf()) == config


def test_a_config_of_nothing_is_fuyu_8b_and_another_model_is_refused():
    assert FuyuConfig.from_hf({}) == FuyuConfig()
    assert FuyuConfig.from_hf({"text_config": None, "rope_theta": None}) == FuyuConfig()
    assert FuyuConfig.from_hf({"text_config": {"hidden_size": None}}) == FuyuConfig()
    with pytest.raises(MMJaxError, match="'llava'; a Fuyu model says 'fuyu'"):
        FuyuConfig.from_hf({"model_type": "llava"})
    for scaling in ({"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}):
        both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": scaling}
        for config in (
            {"rope_scaling": scaling},
            {"text_config": {"rope_parameters": scaling}},
            both,
        ):
            with pytest.raises(MMJaxError, match="rope_type '(linear|dynamic)'; supported is"):
                FuyuConfig.from_hf(config)


def test_of_several_end_tokens_the_first_is_the_models_own(tmp_path):
    """As newer files list them; the others end an answer too, see ``models.companions``."""
    for config in ({"eos_token_id": [13, 2]}, {"text_config": {"eos_token_id": [13, 2]}}):
        assert FuyuConfig.from_hf(config).end_token_ids == (13,)
        (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
        processor = ProcessorConfig.from_folder(tmp_path)
        assert (processor.eos_token_id, processor.pad_token_id) == (13, 0)
