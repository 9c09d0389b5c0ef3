"""The Triton kernels, interpreted, against dense float64 attention; and lowered for CUDA."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from mmjax.ops import flash_triton, triton_parts
from mmjax.ops.attention import attention
from mmjax.parallel.mesh import make_mesh, use
from tests.ops.reference import masks, reference, reference_gradients

# JAX deprecates the backend; it says so at each lowering from 0.11 on.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

TILES = dict(triton_parts.TILES)
SMALL = (triton_parts.Tile(16, 16, 4, 2), triton_parts.Tile(32, 16, 4, 2))
B, T, N, KV, H = 2, 43, 4, 2, 24  # several blocks, the last one cut; a head that is padded
SLOPES = jnp.asarray([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles small enough that short sequences have edges, full blocks and skipped ones."""
    monkeypatch.setattr(triton_parts, "TILES", dict.fromkeys(TILES, SMALL))


def arrays(b=B, t=T, s=T, n=N, kv=KV, h=H, dtype=jnp.float32):
    """Return q, k, v and a gradient for the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((b, t, n, h), (b, s, kv, h), (b, s, kv, h), (b, t, n, h))
    return [
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def run(q, k, v, grad, start, end, slopes, causal, implementation="triton"):
    """Return the output and (dq, dk, dv); one program for all masks of a shape."""

    def fn(q, k, v):
        return attention(
            q, k, v, k_start=start, k_end=end, causal=causal, alibi_slopes=slopes,
            implementation=implementation,
        )  # fmt: skip

    out, pullback = jax.vjp(fn, q, k, v)
    return out, pullback(grad)


def check(q, k, v, grad, start, end, causal, slopes, atol=1e-5):
    out, grads = run(q, k, v, grad, start, end, slopes, causal)
    b, t, s = q.shape[0], q.shape[1], k.shape[1]
    start = np.zeros((b, t)) if start is None else start
    end = np.full((b, t), s) if end is None else end
    np.testing.assert_allclose(out, reference(q, k, v, start, end, causal, slopes), atol=atol)
    expected = reference_gradients(q, k, v, grad, start, end, causal, slopes)
    for got, right in zip(grads, expected, strict=True):
        assert got.dtype == q.dtype
        np.testing.assert_allclose(got, right, atol=atol, rtol=atol)


def test_the_reference_gradients_are_those_of_finite_differences():
    q, k, v, grad = (np.asarray(x, np.float64) for x in arrays(t=9, s=9))
    start, end, causal = masks("window", B, 9, 9)
    args, eps = [q, k, v], 1e-6
    for at, right in enumerate(reference_gradients(q, k, v, grad, start, end, causal, SLOPES)):
        step = np.random.default_rng(at).normal(size=right.shape)
        up, down = (
            np.sum(
                reference(
                    *(x + sign * eps * step if i == at else x for i, x in enumerate(args)),
                    start, end, causal, SLOPES,
                ) * grad
            )
            for sign in (1, -1)
        )  # fmt: skip
        np.testing.assert_allclose(np.sum(right * step), (up - down) / (2 * eps), rtol=1e-7)


@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize(
    "kind", ["causal", "full", "packed", "padded", "window", "media", "random"]
)
def test_forward_and_gradients_equal_dense_float64(kind, slopes):
    start, end, causal = masks(kind, B, T, T)
    if causal:  # causality as a range: all masks then share one program
        end = np.minimum(end, np.arange(1, T + 1))
    check(*arrays(), start.astype(np.int32), end.astype(np.int32), False, slopes)


def test_causal_without_ranges():
    check(*arrays(), None, None, True, None)


def test_queries_beyond_the_last_count_nothing_under_a_steep_slope():
    """ALiBi raises their scores of later keys beyond what float32 has: inf * 0 would be NaN."""
    check(*arrays(1, 18, 64), None, None, False, jnp.asarray([8.0, 6.0, 7.0, 9.0]), atol=1e-3)


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # each shape compiles: nothing is shrunk
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    t=st.integers(1, 50),
    s=st.integers(1, 50),
    kv=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    h=st.sampled_from([8, 16, 20]),
    causal=st.booleans(),
)
def test_any_shape_equals_dense_float64(t, s, kv, groups, h, causal):
    start, end, _ = masks("random", 1, t, s)
    check(*arrays(1, t, s, kv * groups, kv, h), start, end, causal, None)


def test_bfloat16_keeps_float32_statistics():
    start, end, causal = masks("packed", B, T, T)
    check(*arrays(dtype=jnp.bfloat16), start, end, causal, None, atol=4e-2)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_an_empty_range_gives_exactly_zero_and_no_gradient(implementation):
    q, k, v, grad = arrays()
    start, end, _ = masks("full", B, T, T)
    start[:, ::3], end[:, ::3] = 7, 7
    start[1, 1::3], end[1, 1::3] = -9, -2  # outside of [0, s]
    end[0, 1] = 10**6
    out, (dq, dk, dv) = run(q, k, v, grad, start, end, None, False, implementation)
    np.testing.assert_allclose(out, reference(q, k, v, start, end, False), atol=1e-5)
    for x in (out, dq):
        assert not np.asarray(x)[:, ::3].any()
        assert not np.asarray(x)[1, 1::3].any()
    right = reference_gradients(q, k, v, grad, start, end, False)
    np.testing.assert_allclose(dk, right[1], atol=1e-5)
    np.testing.assert_allclose(dv, right[2], atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_where_a_nan_reaches(implementation):
    q, k, v, grad = arrays()
    start, end, _ = masks("packed", B, T, T)
    end = np.minimum(end, np.arange(1, T + 1)).astype(np.int32)
    seen = (np.arange(T) >= start[:, :, None]) & (np.arange(T) < end[:, :, None])
    at = int(start[0, T // 2]) + 1
    fine = run(q, k, v, grad, start, end, None, False, implementation)[0]
    hit = seen[0, :, at]
    assert 0 < hit.sum() < T - 2

    bad = k.at[0, at, 1].set(jnp.nan)  # kv head 1: heads 2 and 3
    out = np.asarray(run(q, bad, v, grad, start, end, None, False, implementation)[0])
    assert np.isnan(out[0, hit, 2:]).all()
    np.testing.assert_array_equal(out[0, ~hit], fine[0, ~hit])
    np.testing.assert_array_equal(out[0, :, :2], fine[0, :, :2])
    np.testing.assert_array_equal(out[1], fine[1])

    bad = q.at[0, at, 1].set(jnp.nan)
    out = np.array(run(bad, k, v, grad, start, end, None, False, implementation)[0])
    assert np.isnan(out[0, at, 1]).all()
    out[0, at, 1] = fine[0, at, 1]
    np.testing.assert_array_equal(out, fine)

    bad = v.at[0, at, 1].set(jnp.nan)  # may reach its row and head, and nothing else
    out = np.asarray(run(q, k, bad, grad, start, end, None, False, implementation)[0])
    assert np.isnan(out[0, hit, 2:]).all()
    np.testing.assert_array_equal(out[0, :, :2], fine[0, :, :2])
    np.testing.assert_array_equal(out[1], fine[1])


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("t, s", [(0, 4), (4, 0), (0, 0)])
def test_a_length_of_zero_gives_zeros(t, s, implementation):
    q, k, v, _ = arrays(t=t, s=s)
    fn = functools.partial(attention, implementation=implementation)
    out, pullback = jax.vjp(fn, q, k, v)
    assert out.shape == q.shape
    assert not np.asarray(out).any()
    for got, x in zip(pullback(out), (q, k, v), strict=True):
        assert got.shape == x.shape
        assert not np.asarray(got).any()


@pytest.mark.parametrize(
    "rows",
    [pytest.param(4, id="rows_divide"), pytest.param(1, marks=pytest.mark.heavy, id="one_row")],
)
def test_a_mesh_gives_what_xla_gives_and_gathers_nothing(rows):
    q, k, v, grad = jax.device_get(arrays(b=rows, t=32, s=32))
    start, end, _ = (np.asarray(x) for x in masks("packed", rows, 32, 32))
    with use(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        args = (q, k, v, grad, start, end, SLOPES)
        out, grads = run(*args, causal=True, implementation="xla")
        got, got_grads = run(*args, causal=True)
    np.testing.assert_allclose(got, out, atol=1e-5)
    for a, b in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    if rows == 4:
        with use(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})) as mesh:
            place = lambda spec: jax.NamedSharding(mesh, spec)  # noqa: E731
            rows_heads = place(jax.P(("data", "fsdp"), None, "tensor"))
            on_rows = place(jax.P(("data", "fsdp")))
            shardings = (*(rows_heads,) * 4, *(on_rows,) * 2, place(jax.P("tensor")))
            placed = tuple(jax.device_put(x, p) for x, p in zip(args, shardings, strict=True))
            compiled = run.lower(*placed, causal=True).compile().as_text()
        assert "shard_map" in compiled
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in compiled


def test_rematerialisation_runs_no_kernel_twice():
    q, k, v, _ = arrays(t=16, s=16)
    policy = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")

    def loss(q, k, v):
        return jnp.sum(attention(jnp.sin(q), k, v, implementation="triton") ** 2)

    def kernels(fn):
        text = str(jax.make_jaxpr(jax.grad(fn, (0, 1, 2)))(q, k, v))
        return text.count("pallas_call[")

    assert kernels(loss) == 3
    assert kernels(jax.checkpoint(loss, policy=policy)) == 3
    assert kernels(jax.checkpoint(loss)) == 4  # without the names the forward runs again


def on_a_hopper():
    """Lower for a GPU that is not here: from 0.12 on Pallas asks which one."""
    device = AbstractDevice("NVIDIA H100", None, "gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    old = jax.__version_info__ < (0, 11)
    return contextlib.nullcontext() if old else jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("h", [64, 72, 80, 96, 128])
def test_forward_and_gradient_lower_for_cuda(h, dtype, monkeypatch):
    monkeypatch.setattr(triton_parts, "TILES", TILES)
    t, n, kv = 2340, 4, 4 if h == 64 else 2
    shapes = [(2, t, n, h), (2, t, kv, h), (2, t, kv, h)]
    q, k, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    rows = jax.ShapeDtypeStruct((2, t), jnp.int32)
    slopes = None if h == 64 else jax.ShapeDtypeStruct((n,), jnp.float32)

    def value_and_grad(q, k, v, start, end, slopes):
        def loss(q, k, v):
            out = flash_triton.flash_attention(
                q, k, v, (start, end), slopes, causal=True, scale=h**-0.5, interpret=False
            )
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    with on_a_hopper():
        traced = jax.jit(value_and_grad).trace(q, k, v, rows, rows, slopes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("flash_forward", "flash_dq", "flash_dkv"):
        assert f'name = "{name}"' in text
    assert f"{t}x{t}" not in text
