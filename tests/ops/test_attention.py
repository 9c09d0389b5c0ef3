"""Range attention against softmax attention in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.ops import flash_xla, ranges
from mmjax.ops.attention import attention
from mmjax.ops.decode import decode_attention
from tests.compiler_options import LIBRARY
from tests.ops.reference import masks, reference, reference_gradients


@pytest.mark.parametrize("kind", ["causal", "full", "packed", "window", "media"])
@pytest.mark.parametrize("loop", [False, True], ids=["unrolled", "loop"])
def test_forward_and_gradients_equal_dense_float64(kind, loop, monkeypatch):
    b, t, s, n, kv, h = 2, 37, 37, 4, 2, 8
    monkeypatch.setattr(flash_xla, "BLOCK_Q", 16)
    monkeypatch.setattr(flash_xla, "LOOP_BLOCK_Q", 16)
    monkeypatch.setattr(flash_xla, "LOOP_BLOCK_K", 12)
    monkeypatch.setattr(flash_xla, "UNROLL_LIMIT", 0 if loop else 10**6)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (b, t, n, h))
    k, v = (jax.random.normal(key, (b, s, kv, h)) for key in keys[1:3])
    weight = jax.random.normal(keys[3], q.shape)
    start, end, causal = masks(kind, b, t, s)
    slopes = jnp.asarray([0.5, 0.25, 0.125, 0.0625]) if kind == "packed" else None

    def ours(q, k, v):
        return attention(q, k, v, k_start=start, k_end=end, causal=causal, alibi_slopes=slopes)

    out = jax.jit(ours)(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, start, end, causal, slopes), atol=1e-5)
    grads = jax.jit(jax.grad(lambda *a: jnp.sum(ours(*a) * weight), (0, 1, 2)))(q, k, v)
    eps, rng = 1e-6, np.random.default_rng(1)
    for at, grad in enumerate(grads):
        step = rng.normal(size=grad.shape)
        moved = [[np.asarray(x, np.float64) for x in (q, k, v)] for _ in range(2)]
        moved[0][at] = moved[0][at] + eps * step
        moved[1][at] = moved[1][at] - eps * step
        up, down = (
            np.sum(reference(*m, start, end, causal, slopes) * np.asarray(weight)) for m in moved
        )
        np.testing.assert_allclose(
            np.sum(np.asarray(grad) * step), (up - down) / (2 * eps), rtol=2e-5, atol=1e-4
        )


@pytest.mark.parametrize("length", [90, 1024], ids=["short", "long"])
def test_a_long_row_of_packed_samples_meets_the_blocks_that_it_needs(length, monkeypatch):
    """Short samples by loops over small blocks, one long sample by chunks; both give the same."""
    b, t, n, kv, h = 2, 1024, 2, 1, 4
    q, grad, k, v = (
        jax.random.normal(key, (b, t, heads, h))
        for key, heads in zip(jax.random.split(jax.random.key(0), 4), (n, n, kv, kv), strict=True)
    )
    segments = jnp.broadcast_to(jnp.arange(t) // length + 1, (b, t)).at[1, 1000:].set(0)
    start, end = ranges.from_segments(segments)
    taken = []
    for name in ("_forward_loop", "_forward_unrolled", "_backward_loop", "_backward_unrolled"):
        _told(monkeypatch, name, taken)

    def ours(q, k, v):
        return attention(q, k, v, k_start=start, k_end=end)

    out, pull = jax.vjp(jax.jit(ours), q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, start, end, True), atol=1e-5)
    exact = reference_gradients(q, k, v, grad, start, end, True)
    for got, want in zip(pull(grad), exact, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    jax.effects_barrier()
    way = "loop" if length < 1024 else "unrolled"
    assert set(taken) == {f"_forward_{way}", f"_backward_{way}"}


def _told(monkeypatch, name, taken):
    """Have a function of ``flash_xla`` tell when it runs, not when it is traced."""
    inner = getattr(flash_xla, name)

    def telling(*args, **options):
        jax.debug.callback(lambda: taken.append(name))
        return inner(*args, **options)

    monkeypatch.setattr(flash_xla, name, telling)


def test_gradients_in_bfloat16_are_those_of_float32_to_its_rounding():
    """Recipes for GPUs compute in bfloat16 and are tried on CPUs: XLA raised for the queries'."""
    q, k, v = (
        jax.random.normal(key, (2, 12, 2, 8)).astype(jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 3)
    )

    def loss(*arrays):
        return (attention(*arrays).astype(jnp.float32) ** 2).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=LIBRARY)
    want = grad(*(x.astype(jnp.float32) for x in (q, k, v)))
    for got, exact in zip(grad(q, k, v), want, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(got), exact, atol=0.02 * np.abs(exact).max())


def test_an_empty_range_gives_zero_and_no_gradient():
    q = jax.random.normal(jax.random.key(0), (1, 5, 2, 4))
    start = jnp.array([[0, 3, -9, 0, 0]])
    end = jnp.array([[0, 3, -2, 5, 5]])
    out, grad = jax.value_and_grad(
        lambda q: jnp.sum(attention(q, q, q, k_start=start, k_end=end, causal=False)[:, :3])
    )(q)
    assert out == 0.0
    assert not np.any(np.asarray(grad))


def test_no_array_of_queries_times_keys_exists():
    t = 4096
    x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
    grad = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)))
    memory = grad.lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * t * t * 4 / 4  # a quarter of one [n, t, s] array


def test_decode_equals_the_last_row_of_attention():
    b, s, n, kv, h = 3, 20, 4, 2, 8
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (b, 1, n, h))
    k, v = (jax.random.normal(key, (b, s, kv, h)) for key in keys[1:])
    length = jnp.array([20, 1, 7])
    full = attention(q, k, v, k_end=length[:, None], causal=False)[:, 0]
    one = decode_attention(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), length)
    np.testing.assert_allclose(one, full, atol=1e-6)


@pytest.mark.parametrize("decoding", [False, True], ids=["attention", "decode"])
def test_the_scale_is_not_rounded_to_bfloat16(decoding):
    """Of head dim 72 that would move all scores by 0.15 %: a weight of exp(-20) by 3 %."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(np.abs(rng.normal(size=(1, 1, 8, 72))) + 0.5, jnp.bfloat16)
    k = np.zeros((1, 2, 8, 72), np.float32)
    score = np.float64(q).sum(-1, keepdims=True) * 72**-0.5
    k[:, :1] = -20.0 / score
    k = jnp.asarray(k, jnp.bfloat16)
    v = jnp.zeros_like(k).at[:, 0].set(1)
    exact = (np.float64(q) * np.float64(k[:, :1])).sum(-1, keepdims=True) * 72**-0.5
    if decoding:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        got = decode_attention(q[:, 0], k, v, jnp.array([2]))[:, None]
    else:
        got = attention(q, k, v, causal=False)
    ratio = np.float64(got) / (np.exp(exact) / (1 + np.exp(exact)))
    assert abs(ratio.mean() - 1) < 5e-3


def decoded(q, k, v, length, scale=8**-0.5, alibi_slopes=None, window=None):
    """The definition, one head of one row after the other."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[1] // k.shape[1]
    for row, head in np.ndindex(q.shape[:2]):
        end, start = length[row], max(0, length[row] - (window or length[row]))
        keys, values = (x[row, head // group, start:end] for x in (k, v))
        scores = keys @ q[row, head] * scale
        if alibi_slopes is not None:
            scores += np.float64(alibi_slopes[head]) * np.arange(start + 1 - end, 1)
        weights = np.exp(scores - scores.max())
        out[row, head] = weights @ values / weights.sum()
    return out


def test_decoding_from_codes_and_scales_equals_the_keys_they_stand_for():
    b, s, n, kv, h = 3, 20, 4, 2, 8
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(b, n, h)), jnp.float32)
    k, v = (jnp.asarray(rng.integers(-127, 128, (b, kv, s, h)), jnp.int8) for _ in range(2))
    k_scale, v_scale = (
        jnp.asarray(rng.uniform(0.002, 0.03, (b, kv, s)), jnp.float32) for _ in "kv"
    )
    whole = (k * k_scale[..., None], v * v_scale[..., None])
    slopes, length = np.float32([0.5, 0.25, 0.1, 0.05]), jnp.array([20, 1, 7])
    for options in (dict(alibi_slopes=slopes), dict(window=5, scale=0.3)):
        got = decode_attention(q, k, v, length, k_scale=k_scale, v_scale=v_scale, **options)
        want = decode_attention(q, *whole, length, **options)
        np.testing.assert_allclose(got, want, atol=1e-6)
        np.testing.assert_allclose(want, decoded(q, *whole, (20, 1, 7), **options), atol=1e-6)


def test_scales_of_values_lose_nothing_in_float16():
    """A weight of 1 / 2,048 times a scale of 1 / 10,000 is below float16's smallest number."""
    s, rng = 2048, np.random.default_rng(0)
    q = jnp.zeros((1, 1, 8), jnp.float16)  # all keys weigh alike
    k, v = (jnp.asarray(rng.integers(60, 128, (1, 1, s, 8)), jnp.int8) for _ in "kv")
    scale = jnp.full((1, 1, s), 1e-4)
    got = decode_attention(q, k, v, jnp.array([s]), k_scale=scale, v_scale=scale)
    assert got.dtype == jnp.float16
    want = np.float64(v).mean(2) * 1e-4
    np.testing.assert_allclose(got, want, rtol=2e-3)


def test_misfitting_shapes_and_unknown_names_are_named():
    x = jnp.zeros((1, 4, 3, 8))
    with pytest.raises(ValueError, match="multiple of k"):
        attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(ValueError, match="'flash' is unknown"):
        attention(x, x, x, implementation="flash")


def test_ranges_of_packed_rows():
    start, end = ranges.from_segments(jnp.array([[1, 1, 2, 3, 3, 0]]))
    assert start.tolist() == [[0, 0, 2, 3, 3, 0]]
    assert end.tolist() == [[2, 2, 3, 5, 5, 0]]
