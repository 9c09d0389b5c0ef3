"""Gated cross attention against the peer's masks, written out in float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models.flamingo import cross_attention as X
from mmjax.nn import paths, stack
from mmjax.nn.linear import DTypes, LoRA

B, T, M, N, D, DV = 2, 9, 3, 4, 8, 6
CONFIG = X.CrossAttentionConfig(
    d_model=D, d_media=DV, num_heads=2, head_dim=4, num_latents=N, init_std=0.5
)
# Row 0: text, three media, then marks of two that were not given. Row 1: padding, then one medium.
INDEX = np.array([[-1, -1, 0, 0, 1, 2, 2, 3, 4], [-1, -1, -1, -1, -1, -1, 0, 0, 0]], np.int32)


def block(**kwargs):
    """A block whose every parameter is random, gates too."""
    kwargs = dict(dtypes=DTypes(), lora=None, rngs=nnx.Rngs(0)) | kwargs
    graphdef, params = nnx.split(X.GatedCrossAttention(CONFIG, **kwargs))
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32).astype(x.dtype), params
    )
    return graphdef, noisy


def inputs():
    rng = np.random.default_rng(0)
    x, media = rng.normal(size=(B, T, D)), rng.normal(size=(B, M * N, DV))
    return x.astype(np.float32), media.astype(np.float32)


@jax.jit
def forward(parts, x, media, ranges):
    module = nnx.merge(*parts)
    return module(x, *module.keys_values(media), *ranges)


def ranges(only_immediate=True, index=INDEX, m=M):
    ids = np.ones_like(index)
    return X.media_ranges(jnp.asarray(index), ids, m, N, only_immediate=only_immediate)


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def attention_rows(scores, text_time, media_time, only_immediate):
    """The peer's softmax: a finite mask, and zero before the first medium if ``only_immediate``."""
    compare = np.equal if only_immediate else np.greater_equal
    seen = compare(text_time[:, None, :, None], media_time)
    scores = np.where(seen, scores, -np.finfo(np.float32).max)
    if not only_immediate:  # media behind a sample's own are padding: the peer has none alone
        own = np.minimum(text_time.max(axis=1), M)[:, None, None, None]
        scores = np.where(media_time <= own, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    if only_immediate:
        weights = np.where(text_time[:, None, :, None] == 0, 0, weights)
    return weights


def in_float64(params, x, media, only_immediate, index=INDEX):
    """The block as the specification states it, in times that count from 1; also its attention."""
    p = {name: np.float64(leaf) for name, leaf in paths.flatten(params).items()}
    x, media = np.float64(x), np.float64(media)
    normed = layer_norm(x, p["attn_norm.scale"], p["attn_norm.bias"])
    q = np.einsum("btd,dnh->btnh", normed, p["attn.q.kernel"]) * CONFIG.head_dim**-0.5
    k, v = (np.einsum("bsd,dnh->bsnh", media, p[f"attn.{name}.kernel"]) for name in "kv")
    media_time = np.repeat(np.arange(1, M + 1), N)
    weights = attention_rows(
        np.einsum("btnh,bsnh->bnts", q, k), index + 1, media_time, only_immediate
    )
    out = np.einsum("bnts,bsnh,nhd->btd", weights, v, p["attn.o.kernel"])
    x = x + np.tanh(p["attn_gate"]) * out
    hidden = layer_norm(x, p["mlp_norm.scale"], p["mlp_norm.bias"]) @ p["mlp.up.kernel"]
    hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + np.tanh(p["ff_gate"]) * (hidden @ p["mlp.down.kernel"]), weights


@pytest.mark.parametrize("only_immediate", [True, False])
def test_a_block_equals_its_statement_in_float64(only_immediate):
    graphdef, params = block()
    x, media = inputs()
    want, weights = in_float64(params, x, media, only_immediate)
    # The masks that the statement is here to pin: nothing, one medium, all alike.
    assert (weights[0, :, 0] == 0).all() == only_immediate
    assert np.allclose(weights[0, :, -1], 1 / (M * N)) == only_immediate
    got = forward((graphdef, params), x, media, ranges(only_immediate))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_ranges_of_the_last_medium():
    start, end, uniform = (np.asarray(a) for a in ranges())
    assert start[0].tolist() == [0, 0, 0, 0, 4, 8, 8, 0, 0]
    assert end[0].tolist() == [0, 0, 4, 4, 8, 12, 12, 12, 12]
    assert uniform[0].tolist() == [False] * 7 + [True] * 2
    assert end[1].tolist() == [0] * 6 + [4] * 3 and not uniform[1].any()


def test_ranges_of_all_media_before():
    start, end, uniform = (np.asarray(a) for a in ranges(False))
    assert not start.any()
    assert end[0].tolist() == [12, 12, 4, 4, 8, 12, 12, 12, 12]
    assert uniform[0].tolist() == [True] * 2 + [False] * 7
    assert end[1].tolist() == [4] * 9  # its own medium, not the two that others of the batch have


def test_all_media_before_are_those_of_the_same_sample():
    index = jnp.asarray([[-1, 0, 1, -1, 2, -1, -1, -1, -1]])
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 0, 0]])
    start, end, uniform = X.media_ranges(index, ids, M, N, only_immediate=False)
    assert start[0].tolist() == [0, 0, 0, 8, 8, 0, 0, 0, 0]
    assert end[0].tolist() == [8, 4, 8, 12, 12, 0, 0, 0, 0]
    assert uniform[0].tolist() == [True, False, False, True, False] + [True] * 4


def test_media_are_counted_within_their_own_sample():
    """Samples of two, none, two (looking ahead, text behind them) and one, then padding."""
    index = jnp.asarray(
        [[-1, 0, 0, 1, -1, 2, 2, 3, -1, 4, -1, -1], [-1, -1, -1, 0, 1, 2] + [-1] * 6]
    )
    ids = jnp.asarray([[1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 0, 0], [1] * 6 + [0] * 6])
    places = np.asarray(X.media_places(index, ids, 6))
    assert places[0, :5].tolist() == [0, 1, 0, 1, 0]
    assert places[1, :3].tolist() == [0, 1, 2]
    # One mark more than media: it moves no other.
    assert np.asarray(X.media_places(index, ids, 4))[0].tolist() == [0, 1, 0, 1]


def test_text_before_the_first_medium_passes_attention_untouched():
    graphdef, params = block()
    x, media = inputs()
    module = nnx.merge(graphdef, params)
    k, v = module.keys_values(jnp.asarray(media))
    out = module.attn(jnp.asarray(x), k, v, *ranges())
    assert (np.asarray(out)[0, :2] == 0).all() and (np.asarray(out)[1, :6] == 0).all()
    moved = forward((graphdef, params), x, media * 2 + 1, ranges())
    still = forward((graphdef, params), x, media, ranges())
    np.testing.assert_array_equal(moved[INDEX < 0], still[INDEX < 0])
    assert (np.abs(moved - still)[INDEX >= 0].max(-1) > 1e-4).all()
    assert (np.abs(still - x)[INDEX < 0].max(-1) > 1e-3).all()  # the MLP ran


def test_without_media_only_the_mlp_runs():
    graphdef, params = block()
    x, media = inputs()
    none = np.full_like(INDEX, -1)
    want = forward((graphdef, params), x, media, ranges(index=none))
    got = forward((graphdef, params), x, media[:, :0], ranges(index=none, m=0))
    np.testing.assert_array_equal(got, want)


def test_new_gates_are_shut():
    parts = nnx.split(X.GatedCrossAttention(CONFIG, dtypes=DTypes(), lora=None, rngs=nnx.Rngs(0)))
    x, media = inputs()
    np.testing.assert_array_equal(forward(parts, x, media, ranges()), x)


@pytest.mark.parametrize("only_immediate", [True, False])
def test_gradients_equal_differences_in_float64(only_immediate):
    graphdef, params = block()
    x, media = inputs()
    weight = np.random.default_rng(3).normal(size=x.shape)

    @jax.jit
    def gradients(params, x, media):
        def loss(params, x, media):
            return jnp.sum(forward((graphdef, params), x, media, ranges(only_immediate)) * weight)

        return jax.grad(loss, (0, 1, 2))(params, x, media)

    grads = gradients(params, x, media)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    rng, eps = np.random.default_rng(4), 1e-6
    leaves, tree = jax.tree.flatten((params, x, media))
    leaves = [np.float64(leaf) for leaf in leaves]
    for at, grad in enumerate(jax.tree.leaves(grads)):
        step = rng.normal(size=grad.shape)
        sides = []
        for sign in (eps, -eps):
            moved = [leaf + sign * step if i == at else leaf for i, leaf in enumerate(leaves)]
            out, _ = in_float64(*jax.tree.unflatten(tree, moved), only_immediate)
            sides.append(np.sum(out * weight))
        slope = (sides[0] - sides[1]) / (2 * eps)
        np.testing.assert_allclose(np.sum(np.asarray(grad) * step), slope, rtol=1e-4, atol=1e-4)


def test_no_matmul_runs_twice_for_the_gradients_of_the_gates():
    """Remat by names keeps what matmuls are given, so a gate may not ask for what they return."""
    graphdef, params = block()
    x, media = inputs()

    def matmuls(run):
        def loss(params, x, media):
            return jnp.sum(run(params, x, media) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(params, x, media).compile()
        return compiled.as_text().count(" dot(")

    def whole(params, x, media):
        return forward((graphdef, params), x, media, ranges())

    assert matmuls(jax.checkpoint(whole, policy=stack.REMAT["names"])) == matmuls(whole) > 18


@pytest.mark.heavy
def test_the_named_implementation_of_attention_runs():
    """The Triton kernels, interpreted: empty ranges, and fewer queries than keys."""
    x, media = inputs()

    @partial(jax.jit, static_argnums=0)
    def run(name, params):
        graphdef, _ = block(attention=name)
        loss = lambda params: jnp.sum(jnp.sin(forward((graphdef, params), x, media, ranges())))  # noqa: E731
        return jax.value_and_grad(loss)(params)

    params = block()[1]
    assert "pallas_call" in str(jax.make_jaxpr(partial(run, "triton"))(params))
    for got, want in zip(
        *(jax.tree.leaves(run(n, params)) for n in ("triton", "xla")), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("only_immediate", [True, False])
@pytest.mark.parametrize("last", [[-1, 0], [2, 1], [3, 7]])
def test_a_decoded_token_equals_the_last_of_a_row(only_immediate, last):
    graphdef, params = block()
    x, media = inputs()
    index = np.array(INDEX)
    index[:, -1] = last
    want = forward((graphdef, params), x, media, ranges(only_immediate, index))[:, -1:]

    @jax.jit
    def one(params, x, media):
        module = nnx.merge(graphdef, params)
        seen = jax.tree.map(lambda x: x[:, -1], ranges(only_immediate, index))
        k, v = module.keys_values(media)
        cached = X.keys_of_next_token(k, v, seen, N, only_immediate=only_immediate)
        return module.decode(x, *cached), cached

    got, (k, v, length) = one(params, x[:, -1:], media)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert k.shape == v.shape == (B, 2, N if only_immediate else M * N, 4)
    assert (np.asarray(length) > 0).all()


def test_a_token_decoded_without_media_sees_nothing():
    graphdef, params = block()
    x, media = inputs()
    none = np.full_like(INDEX, -1)
    want = forward((graphdef, params), x, media, ranges(index=none))[:, -1:]
    module = nnx.merge(graphdef, params)
    k, v = module.keys_values(jnp.asarray(media[:, :0]))
    seen = jax.tree.map(lambda x: x[:, -1], ranges(index=none, m=0))
    cached = X.keys_of_next_token(k, v, seen, N)
    np.testing.assert_allclose(module.decode(jnp.asarray(x[:, -1:]), *cached), want, atol=1e-6)


def test_adapters_go_by_names_of_the_cross_block():
    lora = LoRA(2, 4.0, ("cross.attn.k", "cross.mlp.up"))
    _, params = block(lora=lora)
    found = {name.removesuffix(".lora_a") for name in paths.flatten(params) if "lora_a" in name}
    assert found == {"attn.k", "mlp.up"}


def test_bfloat16_stays_near_float32():
    x, media = inputs()
    graphdef, params = block(dtypes=DTypes("float32", "bfloat16"))
    out = forward((graphdef, params), jnp.asarray(x, jnp.bfloat16), media, ranges())
    assert out.dtype == jnp.bfloat16
    exact = forward(block(), x, media, ranges())
    assert np.abs(np.float32(out) - exact).max() < 0.05 * np.abs(exact).max()


def test_flops_are_those_of_openflamingo_9b():
    c = X.CrossAttentionConfig()
    weights = 139_476_994 - 4 * 4096 - 2  # a published block's, less norms and gates
    (keys, _), (_, text) = c.work(1, 0, media=1), c.work(1, 1, media=1)
    assert keys.flops / c.num_latents + text.maps["cross.*"] == 2.0 * weights
    assert text.scores == 4 * 64 * 512 and c.work(1, 1, media=5)[1] == text
    assert c.work(1, 1, media=0)[1].scores == 0
