"""The decoder: causal, the same in pieces as whole, whatever is saved for the backward pass."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models.decoder import Decoder
from mmjax.nn import paths
from mmjax.nn.linear import DTypes, LoRA
from tests import tiny

# Two queries a key, and the switches that every path has to obey.
CONFIG = dataclasses.replace(
    tiny.CONFIG.decoder, num_kv_heads=2, window=7, embed_scale=2.0, residual_scale=0.8
)
POSITIONS = np.tile(np.arange(12, dtype=np.int32), (2, 1))


def decoder(config=CONFIG, dtypes=DTypes(), **kwargs):  # noqa: B008
    """A decoder whose every parameter is random, biases and norms too."""
    graphdef, params = nnx.split(Decoder(config, dtypes=dtypes, rngs=nnx.Rngs(0), **kwargs))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    leaves = [x + (0.2 * rng.normal(size=x.shape)).astype(x.dtype) for x in leaves]
    return graphdef, jax.tree.unflatten(tree, leaves)


def stream(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 12, 32)).astype(np.float32)


@jax.jit
def forward(parts, x, positions, k_start=None, k_end=None):
    return nnx.merge(*parts)(x, positions, k_start=k_start, k_end=k_end)[0]


def test_no_position_sees_a_later_one():
    parts, x = decoder(), stream()
    before = np.asarray(forward(parts, x, POSITIONS))
    x[:, 7] *= -1.0
    after = np.asarray(forward(parts, x, POSITIONS))
    np.testing.assert_array_equal(after[:, :7], before[:, :7])
    assert (np.abs(after[:, 7:] - before[:, 7:]).max(axis=-1) > 1e-3).all()


def test_rotary_positions_are_relative_and_order_matters():
    parts, x = decoder(), stream()
    want = forward(parts, x, POSITIONS)
    np.testing.assert_allclose(forward(parts, x, POSITIONS + 100), want, atol=1e-4)
    stretched = np.asarray(forward(parts, x, POSITIONS * 3))
    assert np.abs(stretched - want).max() > 1e-2


def test_key_ranges_hide_padding_on_the_left():
    parts, x = decoder(), stream()
    start = np.full((2, 12), 4, np.int32)
    end = np.full((2, 12), 12, np.int32)
    start[:, :4] = end[:, :4] = 0  # the padding itself sees nothing
    hidden = forward(parts, x, POSITIONS, start, end)
    x[:, :4] = 100.0
    again = forward(parts, x, POSITIONS, start, end)
    np.testing.assert_allclose(again[:, 4:], hidden[:, 4:], atol=1e-6)


@pytest.mark.parametrize(
    "apart, dtype, most",
    [(False, None, 1e-5), (True, None, 1e-5), (False, "int8", 8e-3), (True, "int8", 8e-3)],
)
def test_a_prefill_and_single_tokens_equal_the_whole(apart, dtype, most):
    """An int8 cache moves logits of up to 5.0 by 0.007; what a prefill returns is exact."""
    parts, x = decoder(), stream()
    whole = forward(parts, x, POSITIONS)
    lengths = np.array([5, 8], np.int32)  # rows of different lengths go on from where they are

    def layers_of(model):
        return model.unstack() if apart else None

    @jax.jit
    def prefill(parts, x):
        model, at = nnx.merge(*parts), jnp.asarray(lengths)[:, None] - 1
        cache = model.init_cache(2, 16, dtype)
        cache = cache.unstack() if apart else cache
        hidden, cache = model(x, POSITIONS[:, :8], at=at, cache=cache, layers=layers_of(model))
        return hidden, dataclasses.replace(cache, length=jnp.asarray(lengths))

    @jax.jit
    def one(parts, x, cache):
        model = nnx.merge(*parts)
        of = dict(cache=cache, decode=True, layers=layers_of(model))
        hidden, cache = model(x, cache.length[:, None], **of)
        return model.logits(hidden), cache

    hidden, cache = prefill(parts, x[:, :8])
    np.testing.assert_allclose(hidden[:, 0], whole[np.arange(2), lengths - 1], atol=1e-5)
    want = np.asarray(nnx.merge(*parts).logits(whole))
    one = one.lower(parts, x[:, :1], cache).compile()
    for step in range(4):
        at = lengths + step
        logits, cache = one(parts, x[np.arange(2), at][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], want[np.arange(2), at], atol=most)
    if dtype == "int8" and not apart:  # keys are widened a layer at a time
        assert "s8[2,2,2,16,8]" in one.as_text() and "f32[2,2,2,16,8]" not in one.as_text()
    assert cache.length.tolist() == [9, 12]


@pytest.mark.heavy
def test_the_named_implementation_of_attention_runs():
    """The Triton kernels, interpreted; the last layer asks a few queries alone."""
    at = np.array([[3, 11, 0], [5, 5, 8]])
    start = np.where(np.arange(12) < 7, 0, 7) * np.ones((2, 1), np.int32)

    @partial(jax.jit, static_argnums=0)
    def run(name, params, x):
        graphdef, _ = decoder(attention=name)

        def loss(params):
            hidden, _ = nnx.merge(graphdef, params)(x, POSITIONS, k_start=start, at=at)
            return jnp.sum(jnp.sin(hidden))

        return jax.value_and_grad(loss)(params)

    params, x = decoder()[1], stream()
    assert "pallas_call" in str(jax.make_jaxpr(partial(run, "triton"))(params, x))
    (want, grads), (got, found) = run("xla", params, x), run("triton", params, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_remat_and_unrolling_change_neither_values_nor_gradients():
    x = stream()

    def gradients(remat, unroll):
        graphdef, params = decoder(remat=remat, scan_unroll=unroll)

        def loss(params):
            return jnp.sum(nnx.merge(graphdef, params)(x, POSITIONS)[0] ** 2)

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        assert f"unroll={unroll}\n" in str(traced.jaxpr)
        value, grads = traced.lower().compile()(params)
        return value, paths.flatten(grads)

    want, want_grads = gradients("off", 1)
    for policy, unroll in (("names", 2), ("full", 1)):
        got, grads = gradients(policy, unroll)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        for name, grad in want_grads.items():
            scale = float(jnp.abs(grad).max())
            np.testing.assert_allclose(grads[name], grad, atol=1e-5 * scale, err_msg=name)


def test_remat_by_names_runs_no_matmul_twice():
    def matmuls(remat):
        graphdef, params = decoder(remat=remat)

        def loss(params):
            return jnp.sum(nnx.merge(graphdef, params)(stream(), POSITIONS)[0] ** 2)

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert matmuls("names") == matmuls("off") < matmuls("full")


def test_an_unknown_remat_policy_is_named():
    with pytest.raises(ValueError, match=r"'most' is unknown; one of off, names, dots, full"):
        forward(decoder(remat="most"), stream(), POSITIONS)


def test_a_new_adapter_changes_nothing_and_a_trained_one_is_its_product():
    lora = LoRA(3, 6.0, ("attn.q", "attn.o", "mlp.down", "head"))
    model = Decoder(CONFIG, dtypes=DTypes(), rngs=nnx.Rngs(0), lora=lora)
    plain = Decoder(CONFIG, dtypes=DTypes(), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    flat = paths.flatten(params)
    plain_graph, plain_params = nnx.split(plain)
    base = {name: flat[name] for name in paths.flatten(plain_params)}
    x = stream()
    want = forward((plain_graph, paths.replace(plain_params, base)), x, POSITIONS)
    np.testing.assert_allclose(forward((graphdef, params), x, POSITIONS), want, atol=1e-6)

    rng = np.random.default_rng(2)
    for name in flat:
        if name.endswith("lora_b"):
            flat[name] = jnp.asarray(rng.normal(size=flat[name].shape), jnp.float32)
    product = {"attn.q": "ldr,lrnh->ldnh", "attn.o": "lnhr,lrd->lnhd", "mlp.down": "lfr,lrd->lfd"}
    for target, how in product.items():
        at = f"layers.{target}"
        update = np.einsum(how, flat[f"{at}.lora_a"], flat[f"{at}.lora_b"])
        base[f"{at}.kernel"] = base[f"{at}.kernel"] + 2.0 * update  # alpha / rank
    merged = forward((plain_graph, paths.replace(plain_params, base)), x, POSITIONS)
    adapted = forward((graphdef, paths.replace(params, flat)), x, POSITIONS)
    assert np.abs(np.asarray(merged) - want).max() > 0.1
    np.testing.assert_allclose(adapted, merged, atol=1e-4)


def test_without_query_and_key_norms_there_are_no_such_parameters():
    graphdef, params = decoder(dataclasses.replace(CONFIG, qk_norm="none"))
    assert not [name for name in paths.flatten(params) if "q_norm" in name or "k_norm" in name]
    assert np.isfinite(forward((graphdef, params), stream(), POSITIONS)).all()


def test_bfloat16_computation_keeps_float32_logits_and_parameters():
    graphdef, params = decoder(dtypes=DTypes("float32", "bfloat16"))
    assert {str(leaf.dtype) for leaf in paths.flatten(params).values()} == {"float32"}
    x = stream()
    hidden = forward((graphdef, params), x, POSITIONS)
    assert hidden.dtype == jnp.bfloat16
    assert nnx.merge(graphdef, params).logits(hidden).dtype == jnp.float32
    exact = forward(decoder(), x, POSITIONS)
    error = np.abs(np.asarray(hidden, np.float32) - exact)
    assert error.max() < 0.05 * np.abs(exact).max()


def test_parameters_have_the_sizes_of_the_config():
    _, params = decoder()
    flat = {name: leaf.shape for name, leaf in paths.flatten(params).items()}
    assert flat["layers.attn.q.kernel"] == (2, 32, 4, 8)
    assert flat["layers.attn.k.kernel"] == (2, 32, 2, 8)
    assert flat["layers.attn.k_norm.scale"] == (2, 8)
    assert flat["layers.mlp.up.bias"] == (2, 64)
    assert flat["embed.embedding"] == (64, 32)
