"""The Mosaic kernels, in JAX's interpreter, against dense float64 attention; lowered for CUDA.

The interpreter runs each warpgroup as a thread, with TMA's copies and barriers. An arrival that
nobody sees is an error there, and it tells of accesses that nothing orders; but a matmul is done at
once, so that the order of matmuls and barriers is looked at while the kernels are traced. It takes
float32 and blocks of any size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from mmjax.ops import flash_mosaic, mosaic_parts
from mmjax.ops.attention import attention
from mmjax.ops.mosaic_parts import Ring, Tile, Tiles
from tests.ops.reference import masks, reference, reference_gradients

B, T, N, KV, H = 1, 43, 2, 1, 8  # two programs of queries, the last one cut; three blocks of keys
SLOPES = jnp.asarray([0.5, 0.25])
SMALL = Tiles(Tile(16, 2, 16, 2), Tile(16, 2, 16, 2), Tile(16, 2, 16, 2))


@pytest.fixture(autouse=True)
def no_races(monkeypatch, capfd):
    """Let the interpreter compare all copies, loads and stores of shared memory, and fail if two
    meet."""
    looking = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", looking)
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough that short sequences have edges, full blocks and skipped ones."""
    monkeypatch.setitem(mosaic_parts.TILES, H, SMALL)


def arrays(b=B, t=T, s=T, n=N, kv=KV, h=H, dtype=jnp.float32):
    """Return q, k, v and a gradient for the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((b, t, n, h), (b, s, kv, h), (b, s, kv, h), (b, t, n, h))
    return [
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


def both(fn, q, k, v, grad):
    out, pullback = jax.vjp(fn, q, k, v)
    return out, pullback(grad)


@jax.jit
def run(q, k, v, grad, start, end, slopes):
    """Return the output and (dq, dk, dv); one program for all masks of a shape."""
    s = k.shape[1]
    ranges = jnp.clip(start, 0, s), jnp.clip(end, 0, s)
    fn = functools.partial(flash_mosaic.flash_attention, causal=False, scale=q.shape[3] ** -0.5)
    return both(lambda q, k, v: fn(q, k, v, ranges, slopes), q, k, v, grad)


def as_ranges(kind, b, t, s):
    """Return (start, end) of a mask with causality in its ends: all masks then share a program."""
    start, end, causal = masks(kind, b, t, s)
    end = np.minimum(end, np.arange(1, t + 1)) if causal else end
    return start.astype(np.int32), end.astype(np.int32)


@pytest.mark.parametrize(
    "kind", ["causal", "full", "packed", "padded", "window", "media", "random"]
)
def test_forward_and_gradients_equal_dense_float64(kind, small_tiles):
    q, k, v, grad = arrays()
    start, end = as_ranges(kind, B, T, T)
    out, grads = run(q, k, v, grad, start, end, SLOPES)
    mask = start, end, False, SLOPES
    np.testing.assert_allclose(out, reference(q, k, v, *mask), atol=1e-5)
    for got, right in zip(grads, reference_gradients(q, k, v, grad, *mask), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5, rtol=1e-5)


def test_rows_groups_and_other_keys_without_slopes(small_tiles):
    q, k, v, grad = arrays(b=2, t=18, s=37, n=4, kv=2)
    start, end = as_ranges("random", 2, 18, 37)
    start[1, ::3], end[1, ::3] = 7, 7
    out, grads = run(q, k, v, grad, start, end, None)
    mask = start, end, False
    np.testing.assert_allclose(out, reference(q, k, v, *mask), atol=1e-5)
    for got, right in zip(grads, reference_gradients(q, k, v, grad, *mask), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5, rtol=1e-5)
    for x in (out, grads[0]):  # empty ranges, within [0, s] and outside
        empty = np.minimum(end, 37) <= np.maximum(start, 0)
        assert empty.sum() > 10 and not np.asarray(x)[empty].any()


def test_a_query_without_keys_stands_among_those_that_see_all(small_tiles):
    """It takes part in the blocks that need no mask, and what it finds there counts nothing."""
    q, k, v, grad = arrays()
    start, end = as_ranges("full", B, T, T)
    start[:, ::3] = end[:, ::3] = 7
    out, grads = run(q, k, v, grad, start, end, SLOPES)
    mask = start, end, False, SLOPES
    np.testing.assert_allclose(out, reference(q, k, v, *mask), atol=1e-5)
    for got, right in zip(grads, reference_gradients(q, k, v, grad, *mask), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5, rtol=1e-5)
    for x in (out, grads[0]):
        assert not np.asarray(x)[:, ::3].any()


def test_queries_beyond_the_last_count_nothing_under_a_steep_slope(small_tiles):
    """ALiBi raises their scores of later keys beyond what float32 has: inf * 0 would be NaN."""
    q, k, v, grad = arrays(t=18, s=64)  # the second block has 24 to 31, which are in no array
    start, end = as_ranges("full", B, 18, 64)
    slopes = jnp.asarray([8.0, 6.0])
    _, grads = run(q, k, v, grad, start, end, slopes)
    mask = start, end, False, slopes
    for got, right in zip(grads, reference_gradients(q, k, v, grad, *mask), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "dtype, h, t, bound", [("bfloat16", 128, 131, 2**-8), ("float16", 64, 136, 2**-11)]
)
def test_the_tiles_and_dtypes_of_a_gpu_keep_float32_statistics(dtype, h, t, bound):
    q, k, v, grad = arrays(t=t, s=t, n=2, kv=1, h=h, dtype=dtype)
    fn = functools.partial(attention, implementation="mosaic")
    out, grads = jax.jit(functools.partial(both, fn))(q, k, v, grad)
    mask = np.zeros((B, t)), np.full((B, t), t), True
    expected = reference(q, k, v, *mask), *reference_gradients(q, k, v, grad, *mask)
    for got, right in zip((out, *grads), expected, strict=True):
        assert got.dtype == dtype and got.shape == right.shape
        assert np.abs(np.asarray(got, np.float64) - right).max() < bound * np.abs(right).max()


def test_what_no_range_reaches_is_not_read(small_tiles):
    q, k, v, grad = arrays()
    start = np.where(np.arange(T) < 32, 0, 32).astype(np.int32)[None]
    end = np.where(np.arange(T) < 32, 32, T).astype(np.int32)[None]
    fine = run(q, k, v, grad, start, end, SLOPES)
    # A block that is read spreads them, for 0 * NaN is NaN.
    k, v, grad = (x.at[:, 32:].set(jnp.nan) for x in (k, v, grad))
    out, (dq, dk, dv) = run(q, k, v, grad, start, end, SLOPES)
    for got, right in zip((out, dq, dk, dv), (fine[0], *fine[1]), strict=True):
        np.testing.assert_array_equal(got[:, :32], right[:, :32])
        assert np.isnan(np.asarray(got)[:, 32:]).all()


def test_a_nan_in_a_key_reaches_who_sees_it(small_tiles):
    q, k, v, grad = arrays()
    start, end = as_ranges("packed", B, T, T)
    at = int(start[0, T // 2]) + 1
    hit = (at >= start[0]) & (at < end[0])
    assert 0 < hit.sum() < T - 2
    fine = run(q, k, v, grad, start, end, SLOPES)[0]
    out = np.asarray(run(q, k.at[0, at].set(jnp.nan), v, grad, start, end, SLOPES)[0])
    assert np.isnan(out[0, hit]).all()
    np.testing.assert_array_equal(out[0, ~hit], fine[0, ~hit])


def on_a_hopper():
    """Lower for a GPU that is not here: from 0.12 on Pallas asks which one."""
    device = AbstractDevice("NVIDIA H100", None, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def loss(q, k, v, start, end, slopes):
    out = flash_mosaic.flash_attention(
        jnp.sin(q), k, v, (start, end), slopes, causal=True, scale=0.125, interpret=False
    )
    return jnp.sum(out.astype(jnp.float32) ** 2)


def arguments(t, n, kv, h, dtype, slopes=True):
    """Return the shapes of what ``loss`` takes."""
    rows = jax.ShapeDtypeStruct((2, t), jnp.int32)
    heads = [jax.ShapeDtypeStruct((2, t, x, h), dtype) for x in (n, kv, kv)]
    return *heads, rows, rows, jax.ShapeDtypeStruct((n,), jnp.float32) if slopes else None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("h", [64, 128])
def test_forward_and_gradient_lower_for_cuda(h, dtype):
    t = 2340
    args = arguments(t, 4, 4 if h == 64 else 2, h, dtype, slopes=h == 64)
    with on_a_hopper():
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3
    for name in ("flash_forward", "flash_dq", "flash_dkv"):
        assert name in text
    assert f"{t}x{t}" not in text and "2344x2344" not in text


def test_rematerialisation_runs_no_kernel_twice():
    policy = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")

    def kernels(fn):
        text = str(jax.make_jaxpr(jax.grad(fn, (0, 1, 2)))(*arguments(64, 2, 2, 64, "bfloat16")))
        return text.count("custom_vmap_call[")  # around each kernel, so that vmap can take it

    assert kernels(loss) == 3
    assert kernels(jax.checkpoint(loss, policy=policy)) == 3
    assert kernels(jax.checkpoint(loss)) == 4  # without the names the forward runs again


class Watched:
    """What the warpgroups of a kernel do with the slots of its rings, as it is traced.

    rings: by name. held: those between the wait for a slot and its release. read: those that a
    matmul under way may read. freed: how often a slot was, by kernel.
    """

    def __init__(self, monkeypatch):
        self.rings, self.held, self.read, self.freed = {}, set(), set(), {}
        real_call, real_product = mosaic_parts.call, mosaic_parts.product

        def call(kernel, name, *rest):
            def run(x, **scratch):
                self.rings = {k: v for k, v in scratch.items() if isinstance(v, Ring)}
                self.name = name
                kernel(x, **scratch)
                assert not self.held and not self.read

            return real_call(run, name, *rest)

        def product(a, b):
            result = real_product(a, b)  # its last read of the accumulator waits for all matmuls
            self.read.clear()
            return result

        monkeypatch.setattr(mosaic_parts, "call", call)
        monkeypatch.setattr(mosaic_parts, "product", product)
        for does in (
            self.wgmma,
            self.wgmma_wait,
            self.load,
            self.barrier_wait,
            self.barrier_arrive,
        ):
            monkeypatch.setattr(
                plgpu, does.__name__, self.then(does, getattr(plgpu, does.__name__))
            )

    @staticmethod
    def then(look, real):
        def both(*args, **kwargs):
            look(*args)
            return real(*args, **kwargs)

        return both

    def ring(self, ref, part):
        """Return the ring, by name, of which a ref is a part: slots, loaded or freed."""
        ref = getattr(ref, "ref", ref)
        own = (
            name
            for name, ring in self.rings.items()
            for x in jax.tree.leaves(getattr(ring, part))
            if x is ref
        )
        return next(own, None)

    def wgmma(self, total, *operands):
        read = {self.ring(x, "slots") for x in operands} - {None}
        assert read <= self.held
        self.read |= read

    def wgmma_wait(self, under_way):
        assert under_way == 0
        self.read.clear()

    def load(self, ref):
        assert self.ring(ref, "slots") in {None, *self.held}

    def barrier_wait(self, barrier):
        if name := self.ring(barrier, "loaded"):
            assert name not in self.held
            self.held.add(name)

    def barrier_arrive(self, barrier):
        name = self.ring(barrier, "freed")
        assert name in self.held - self.read
        self.held.remove(name)
        self.freed[self.name] = self.freed.get(self.name, 0) + 1


@pytest.mark.parametrize("h", [64, 128])
def test_a_slot_is_read_after_it_is_loaded_and_freed_after_the_last_matmul_on_it(h, monkeypatch):
    """Over blocks with a mask and over those without, which are traced once each."""
    watched = Watched(monkeypatch)
    jax.eval_shape(jax.grad(loss, (0, 1, 2)), *arguments(64, 4, 2, h, "bfloat16"))
    assert watched.freed == {"flash_forward": 4, "flash_dq": 4, "flash_dkv": 2}
