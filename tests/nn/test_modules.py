"""The small modules against formulas in float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.nn import cache, paths, rope, stack
from mmjax.nn.attention import rope_dims
from mmjax.nn.embed import Embed, PositionEmbed
from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.mlp import MLP, squared_relu
from mmjax.nn.norm import LayerNorm, RMSNorm
from mmjax.train import matrices
from tests import compiler_options

RNG = np.random.default_rng(0)


def rotated(x, positions, dims, theta):
    """The rotation by its definition: pairs (i, i + dims/2) as complex numbers, in float64."""
    half = dims // 2
    frequency = theta ** (-2.0 * np.arange(half) / dims)
    turn = np.exp(1j * positions[:, :, None, None] * frequency)
    pair = (x[..., :half] + 1j * x[..., half:dims]) * turn
    return np.concatenate([pair.real, pair.imag, x[..., dims:]], -1)


@pytest.mark.parametrize("dims, theta", [(4, 25000.0), (8, 10000.0), (6, 25000.0)])
def test_rope_equals_the_formula_and_passes_the_rest_of_the_head(dims, theta):
    x = RNG.normal(size=(2, 5, 3, 8))
    positions = RNG.integers(0, 3000, (2, 5))
    cos, sin = rope.angles(jnp.asarray(positions, jnp.int32), dims, theta)
    assert cos.shape == (2, 5, dims // 2) and cos.dtype == jnp.float32
    got = rope.rotate(jnp.asarray(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(got, rotated(x, positions, dims, theta), atol=2e-3)
    np.testing.assert_array_equal(got[..., dims:], np.float32(x[..., dims:]))


def test_rope_keeps_lengths_and_depends_on_distance_alone():
    q, k = (jnp.asarray(RNG.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(i, j):
        a, b = (rope.rotate(x, *rope.angles(jnp.array([[p]]), 8, 1e4)) for x, p in ((q, i), (k, j)))
        return float((a * b).sum())

    np.testing.assert_allclose(product(7, 3), product(107, 103), rtol=1e-4)
    turned = rope.rotate(q, *rope.angles(jnp.array([[13]]), 8, 1e4))
    np.testing.assert_allclose(jnp.linalg.norm(turned), jnp.linalg.norm(q), rtol=1e-6)


def test_rope_dims_are_even():
    assert [rope_dims(64, 0.5), rope_dims(64, 1.0), rope_dims(80, 0.4)] == [32, 64, 32]
    assert rope_dims(6, 0.5) == 2


def test_layer_norm_equals_the_formula_even_far_from_zero():
    norm = LayerNorm(16, eps=1e-5, dtypes=DTypes())
    scale, bias = RNG.normal(size=(2, 16))
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    norm.bias[...] = jnp.asarray(bias, jnp.float32)
    x = RNG.normal(size=(3, 16)).astype(np.float32) + 1000
    wide = np.float64(x)
    centred = wide - wide.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, atol=2e-3)


def test_layer_norm_counts_in_float32_and_answers_in_the_compute_dtype():
    norm = LayerNorm(8, eps=1e-5, dtypes=DTypes("float32", "bfloat16"))
    x = jnp.asarray(RNG.normal(size=(2, 8)), jnp.bfloat16)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(np.float32(out), want, atol=0.02)


def test_one_plus_a_scale_is_not_rounded_to_bfloat16():
    """Gemma's scales are small and published in bfloat16, where 1 + 2**-9 is 1."""
    norm = RMSNorm(4, eps=0.0, dtypes=DTypes("bfloat16", "float32"), plus_one=True)
    norm.scale[...] = jnp.asarray([2**-9, -(2**-10), 0.0, 0.5], jnp.bfloat16)
    got = norm(jnp.asarray([[1.0, -1.0, 1.0, 1.0]], jnp.bfloat16))
    np.testing.assert_array_equal(got, [[1 + 2**-9, -1 + 2**-10, 1.0, 1.5]])


def test_the_gradient_of_a_scale_has_its_dtype():
    graphdef, params = nnx.split(LayerNorm(8, eps=1e-5, dtypes=DTypes("bfloat16", "float32")))
    x = jnp.asarray(RNG.normal(size=(2, 8)), jnp.float32)
    grads = jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x))))(params)
    assert {str(grad.dtype) for grad in paths.flatten(grads).values()} == {"bfloat16"}


def linear(lora=None, d_in=(4, 3), d_out=(2, 5)):
    axes = ("heads", "head_dim", "embed", "norm")[: len(d_in) + len(d_out)]
    return Linear(
        d_in, d_out, axes, name="x", bias=True, dtypes=DTypes(), init_std=0.1, lora=lora,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


def test_linear_contracts_groups_of_axes():
    layer = linear()
    layer.bias[...] = jnp.arange(10.0).reshape(2, 5)
    x = RNG.normal(size=(6, 4, 3))
    want = np.einsum("bij,ijkl->bkl", x, np.float64(layer.kernel[...])) + np.float64(
        layer.bias[...]
    )
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), want, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 24), (24, 8)], ids=["wide", "tall"])
def test_gradients_of_a_kernel_equal_the_formula(size):
    """On a CPU that of a tall kernel is the product of a wide one, turned around behind it."""
    layer, rng = linear(d_in=size[:1], d_out=size[1:]), np.random.default_rng(0)
    graphdef, params = nnx.split(layer)
    x, grad = (jnp.asarray(rng.normal(size=(3, 5, n)), jnp.float32) for n in size)

    def gradients(params, x, grad):
        return jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)[1](grad)

    lowered = jax.jit(gradients).lower(params, x, grad)
    compiled = lowered.compile(compiler_options=compiler_options.LIBRARY)
    (d_params, d_x), kernel = compiled(params, x, grad), layer.kernel[...]
    np.testing.assert_allclose(d_x, grad @ kernel.T, atol=1e-5)
    d_kernel = np.einsum("bti,bto->io", np.float64(x), np.float64(grad))
    np.testing.assert_allclose(d_params["kernel"][...], d_kernel, atol=1e-5)
    made = re.findall(r"f32\[([\d,]+)\]{([\d,]+)} dot\(", compiled.as_text())
    wide = [("8,24", "1,0"), ("24,8", "0,1")]  # the same product, as it lies in memory
    assert len(made) == 2 and len(set(made) & set(wide)) == 1


def test_an_adapter_starts_at_nothing_and_equals_the_merged_kernel():
    plain, adapted = linear(), linear(LoRA(2, 8.0, ("x",)))
    x = jnp.asarray(RNG.normal(size=(6, 4, 3)), jnp.float32)
    np.testing.assert_array_equal(plain.kernel[...], adapted.kernel[...])
    np.testing.assert_array_equal(plain(x), adapted(x))
    b = RNG.normal(size=(2, 2, 5))
    adapted.lora_b[...] = jnp.asarray(b, jnp.float32)
    update = np.einsum("ijr,rkl->ijkl", np.float64(adapted.lora_a[...]), b) * (8.0 / 2)
    plain.kernel[...] = plain.kernel[...] + jnp.asarray(update, jnp.float32)
    np.testing.assert_allclose(adapted(x), plain(x), atol=1e-5)
    assert not np.allclose(adapted(x), linear()(x))


def test_only_named_maps_are_adapted():
    assert linear(LoRA(2, 8.0, ("y",))).lora_a is None
    names = set(paths.flatten(nnx.state(linear(LoRA(2, 8.0, ("x",))))))
    assert names == {"kernel", "bias", "lora_a", "lora_b"}


def test_mlp_squares_what_is_positive():
    np.testing.assert_array_equal(squared_relu(jnp.array([-2.0, 0.0, 3.0])), [0, 0, 9])
    mlp = MLP(4, 8, activation="relu2", dtypes=DTypes(), init_std=0.5, lora=None, rngs=nnx.Rngs(1))
    x = RNG.normal(size=(2, 3, 4))
    hidden = np.maximum(x @ np.float64(mlp.up.kernel[...]), 0) ** 2
    want = hidden @ np.float64(mlp.down.kernel[...])
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), want, atol=1e-5)


def test_embed_looks_up():
    embed = Embed(10, 4, dtypes=DTypes(), init_std=1.0, rngs=nnx.Rngs(0))
    got = embed(jnp.array([[3, 0], [9, 3]]))
    np.testing.assert_array_equal(got, np.asarray(embed.embedding[...])[[[3, 0], [9, 3]]])
    x = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
    np.testing.assert_allclose(embed.attend(x), x @ embed.embedding[...].T, atol=1e-5)


def test_tables_answer_in_the_compute_dtype_and_are_cut_by_their_axes():
    mixed = dict(dtypes=DTypes("float32", "bfloat16"), init_std=1.0, rngs=nnx.Rngs(0))
    embed, places = Embed(10, 4, **mixed), PositionEmbed(6, 4, **mixed)
    for table, axes in ((embed, ("vocab", "embed")), (places, (None, "embed"))):
        assert matrices.axes_of(table.embedding) == axes and table.embedding.dtype == jnp.float32
        assert table(jnp.array([[3]])).dtype == jnp.bfloat16
    assert embed.attend(jnp.ones((2, 4))).dtype == jnp.bfloat16
    # Beyond the table its last row stands for all others.
    got, last = places(jnp.array([[5, 6, 99]])), places.embedding[5].astype(jnp.bfloat16)
    np.testing.assert_array_equal(got[0], [last] * 3)


class Layer(nnx.Module):
    """y = tanh(x w)."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 3)), out_sharding=("embed", "mlp"))

    def __call__(self, x):
        return jnp.tanh(x @ self.w[...])


@pytest.mark.parametrize("remat", list(stack.REMAT))
def test_scan_equals_a_python_loop_with_every_remat(remat):
    layers = stack.stack(Layer, 4, nnx.Rngs(0))
    w = np.asarray(layers.w[...])
    assert w.shape == (4, 3, 3) and len(np.unique(w.round(4))) > 30  # each layer its own numbers
    x = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)

    def run(x):
        return stack.scan(layers, 4, lambda layer, c, _: layer(c), x, remat=remat).sum()

    def plain(x):
        for one in w:
            x = jnp.tanh(x @ one)
        return x.sum()

    for ours, theirs in zip(jax.value_and_grad(run)(x), jax.value_and_grad(plain)(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", ["off", "names", "full"])
@pytest.mark.parametrize("count", [4, 5])
def test_blocks_stand_before_every_second_layer(count, remat):
    layers, blocks = stack.stack(Layer, count, nnx.Rngs(0)), stack.stack(Layer, 2, nnx.Rngs(1))
    x = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
    between = stack.Between(blocks, 2, lambda block, x, i: x + (i + 1) * block(x))

    def run(w, v, x):
        a, b = (paths.replace(nnx.state(m), {"w": k}) for m, k in ((layers, w), (blocks, v)))
        stacked = nnx.merge(nnx.graphdef(layers), a)
        among = dataclasses.replace(between, blocks=nnx.merge(nnx.graphdef(blocks), b))
        step = lambda layer, x, i: layer(x) * (i + 1)  # noqa: E731
        return stack.scan(stacked, count, step, x, remat=remat, between=among).sum()

    def plain(w, v, x):
        for i in range(count):
            if i % 2:
                x = x + (i // 2 + 1) * jnp.tanh(x @ v[i // 2])
            x = jnp.tanh(x @ w[i]) * (i + 1)
        return x.sum()

    args = (layers.w[...], blocks.w[...], x)
    for ours, theirs in zip(
        jax.value_and_grad(run, (0, 1, 2))(*args), jax.value_and_grad(plain, (0, 1, 2))(*args),
        strict=True,
    ):  # fmt: skip
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, theirs
        )


def test_weights_of_layers_in_groups_are_not_kept_a_second_time():
    layers, blocks = stack.stack(Layer, 4, nnx.Rngs(0)), stack.stack(Layer, 2, nnx.Rngs(1))
    between = stack.Between(blocks, 2, lambda block, x, i: block(x))

    def pullback(x):
        step = lambda layer, x, i: layer(x)  # noqa: E731
        run = lambda x: stack.scan(layers, 4, step, x, remat="full", between=between)  # noqa: E731
        return jax.vjp(run, x)[1]

    jaxpr = jax.make_jaxpr(pullback)(jnp.ones((7, 3))).jaxpr
    (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    kept = sorted(v.aval.shape for v in scan.outvars if v.aval.ndim > 2)  # the carry is [7, 3]
    assert kept == [(2, 7, 3)] * 3  # what each of two layers and a block of a group was given


def test_an_unknown_remat_is_named():
    with pytest.raises(ValueError, match="remat policy 'all'"):
        stack.scan(stack.stack(Layer, 2, nnx.Rngs(0)), 2, None, 0, remat="all")


def test_the_cache_takes_each_row_at_its_own_place():
    empty = cache.Cache.empty(2, 3, 6, 2, 4, jnp.float32)
    new = jnp.asarray(RNG.normal(size=(3, 1, 2, 4)), jnp.float32)
    at = jnp.array([0, 5, 2])
    got = np.asarray(cache.write(empty.k, jnp.int32(1), at, new))
    want = np.zeros((2, 3, 2, 6, 4), np.float32)
    for row in range(3):
        want[1, row, :, at[row]] = new[row, 0]
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="one key a row, got 2"):
        cache.write(empty.k, jnp.int32(0), at, jnp.zeros((3, 2, 2, 4)))


def test_the_cache_gives_rows_in_any_order_stacked_or_not():
    k, v = RNG.normal(size=(2, 2, 3, 1, 4, 2)).astype(np.float32)
    full = cache.Cache(jnp.asarray(k), jnp.asarray(v), jnp.array([4, 1, 2]))
    rows = jnp.array([2, 2, 0, 1])
    for got in (full.take(rows).unstack(), full.unstack().take(rows)):
        np.testing.assert_array_equal(np.concatenate(got.k), k[:, [2, 2, 0, 1]])
        np.testing.assert_array_equal(np.concatenate(got.v), v[:, [2, 2, 0, 1]])
        assert got.length.tolist() == [2, 2, 4, 1]


def test_an_int8_cache_rounds_each_head_by_half_a_step_at_most():
    numbers = RNG.normal(size=(2, 3, 2, 2, 4)) * np.reshape([1, 0, 30], (3, 1, 1, 1))
    k, v = jnp.asarray(numbers, jnp.float32)
    buffers = cache.Cache.empty(2, 3, 5, 2, 4, jnp.int8).buffers
    buffers = cache.store(buffers, jnp.int32(1), None, k, v)  # positions 0 and 1 of each row
    buffers = cache.store(buffers, jnp.int32(1), jnp.array([4, 2, 2]), k[:, :1], v[:, :1])
    assert [x.dtype.name for x in buffers] == ["int8", "int8", "float32", "float32"]
    for codes, scale, new in zip(buffers[:2], buffers[2:], (k, v), strict=True):
        new = np.asarray(new).swapaxes(1, 2)
        want = np.zeros((3, 2, 5, 4))
        want[:, :, :2] = new
        want[range(3), :, [4, 2, 2]] = new[:, :, 0]
        step = np.where(want.any(-1), np.abs(want).max(-1), 0) / 127
        error = np.abs(np.asarray(codes[1]) * np.asarray(scale[1])[..., None] - want)
        assert (error <= 0.5001 * step[..., None]).all()
        filled = step > 0
        np.testing.assert_allclose(np.asarray(scale[1])[filled], step[filled], rtol=1e-6)
        assert not np.any(codes[0]) and not np.any(scale[0])

    full = cache.Cache.of(buffers, jnp.array([5, 3, 3]))
    rows = np.array([2, 0, 2])
    for got in (full.take(rows).unstack(), full.unstack().take(rows)):
        for a, b in zip(got.buffers, full.buffers, strict=True):
            np.testing.assert_array_equal(np.concatenate(a), b[:, rows])
        assert got.length.tolist() == [3, 5, 3]


def test_an_int8_cache_takes_h_plus_4_bytes_a_head_and_key():
    def size(dtype):
        made = jax.eval_shape(lambda: cache.Cache.empty(2, 3, 64, 2, 64, dtype).buffers)
        return sum(x.size * x.dtype.itemsize for x in made)

    keys = 2 * (2 * 3 * 64 * 2)
    assert [size(d) // keys for d in cache.DTYPES] == [256, 128, 128, 68]
    with pytest.raises(ValueError, match="cannot store int4; one of float32, bfloat16, float16, i"):
        size("int4")


def test_paths_are_dotted_and_replace_is_by_name():
    layers = stack.stack(Layer, 2, nnx.Rngs(0))
    state = nnx.state(layers)
    assert list(paths.flatten(state)) == ["w"]
    other = paths.replace(state, {"w": jnp.zeros((2, 3, 3))})
    assert not np.any(paths.flatten(other)["w"])
    assert paths.flatten(paths.map_named(lambda name, _: name, state)) == {"w": "w"}


def test_a_scan_reads_weights_where_they_lie():
    """Temporary memory of one layer's weights, not of all six."""

    def make(rngs):
        d = (64,)
        of = dict(name="up", bias=False, dtypes=DTypes(), init_std=0.02, rngs=rngs)
        return Linear(d, d, ("embed", "mlp"), **of)

    graphdef, params = nnx.split(stack.stack(make, 6, nnx.Rngs(0)))

    def run(params, x):
        return stack.scan(nnx.merge(graphdef, params), 6, lambda m, x, i: jnp.tanh(m(x)), x)

    compiled = jax.jit(run).lower(params, jnp.ones((2, 64))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 64 * 64 * 4
