"""Which implementation of attention a call gets, and what an explicit choice says. No GPU here."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import stack
from mmjax.ops import flash_cudnn, flash_xla, implementations
from mmjax.ops.attention import IMPLEMENTATIONS, attention
from mmjax.ops.implementations import Call, choose
from mmjax.parallel.mesh import make_mesh, use
from tests.ops.reference import reference, reference_gradients

X = jax.ShapeDtypeStruct((1, 32, 2, 64), jnp.bfloat16)


def call(x=X, k=None, **changes):
    """Return a call of self-attention, or to other keys."""
    return Call(x, x if k is None else k, x if k is None else k, **changes)


@pytest.fixture
def gpu(monkeypatch):
    """Stand on an H100 whose cuDNN passed; gives a list of the kinds that were tried."""
    tried = []
    monkeypatch.setattr(implementations, "capability", lambda: 9.0)
    monkeypatch.setattr(flash_cudnn, "trouble", lambda *kind: tried.append(kind))
    return tried


def said(caplog):
    return [x.getMessage() for x in caplog.records if x.name == implementations.__name__]


def test_auto_on_a_cpu_is_xla_and_tries_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(flash_cudnn, "trouble", lambda *kind: 1 / 0)
    implementations._say.cache_clear()
    assert choose("auto", call()) == choose("auto", call(causal=False)) == "xla"
    assert said(caplog) == ["attention runs as xla: the backend is cpu"]
    assert {*implementations.PREFERRED, "mosaic"} == {*implementations.TABLE}
    assert ("auto", *implementations.TABLE) == IMPLEMENTATIONS


def test_auto_takes_the_first_that_can_and_says_once_why(gpu, caplog):
    caplog.set_level(logging.INFO)
    implementations._say.cache_clear()
    assert choose("auto", call()) == choose("auto", call()) == "cudnn"
    assert choose("auto", call(ranges=True)) == choose("auto", call(ranges=True)) == "triton"
    wide, odd = X.update(shape=(1, 32, 2, 264)), X.update(dtype=jnp.float8_e4m3fn)
    assert choose("auto", call(wide)) == choose("auto", call(odd)) == "xla"
    assert choose("auto", call(X.update(shape=(1, 8, 2, 64)))) == "xla"
    lines = said(caplog)
    assert [x.split(":")[0].split()[-1] for x in lines] == ["cudnn", "triton"] + ["xla"] * 3
    assert "not cudnn: queries have ranges" in lines[1]
    assert "not triton: head dim 264" in lines[2] and "fewer than 16 queries" in lines[4]
    assert gpu == [("bfloat16", 64, "causal")] * 2


def test_auto_leaves_out_what_failed_and_what_may_differ_between_processes(gpu, monkeypatch):
    with monkeypatch.context() as among:
        among.setattr(jax, "process_count", lambda: 2)
        assert choose("auto", call()) == "triton"
        assert choose("cudnn", call()) == "cudnn"
    monkeypatch.setattr(flash_cudnn, "trouble", lambda *kind: "its probe failed: no plans")
    assert choose("auto", call()) == "triton"
    with pytest.raises(ValueError, match='probe failed: no plans; "triton" or "xla" would work'):
        choose("cudnn", call())


def test_a_gpu_without_bfloat16_tensor_cores_runs_xla(monkeypatch):
    monkeypatch.setattr(implementations, "capability", lambda: 7.5)
    assert choose("auto", call()) == "xla"
    with pytest.raises(ValueError, match='compute capability 8.0 and this GPU has 7.5; "xla"'):
        choose("cudnn", call())


@pytest.mark.parametrize(
    "wrong, says",
    [
        (call(ranges=True), "ranges of keys"),
        (call(slopes=True), "ALiBi"),
        (call(k=X.update(shape=(1, 40, 2, 64))), "32 queries to 40 keys"),
        (call(X.update(dtype=jnp.float32)), "float32, float32, float32; cast them to one of bfl"),
        (call(X.update(shape=(1, 32, 2, 60))), "head dim 60 is no multiple of 8, at most 256"),
        (call(X.update(shape=(1, 32, 2, 264))), "head dim 264 is no multiple of 8, at most 256"),
    ],
)
def test_what_cudnn_cannot_do_is_said_before_it_is_tried(gpu, wrong, says):
    with pytest.raises(ValueError, match=says):
        choose("cudnn", wrong)
    assert gpu == []


def test_cudnn_takes_other_keys_grouped_heads_and_wide_heads_where_it_can(gpu, monkeypatch):
    for s in (40, 41):
        keys = X.update(shape=(1, s, 1, 64))
        assert choose("cudnn", call(k=keys, causal=False)) == "cudnn"
    wide = call(X.update(shape=(1, 32, 2, 256)))
    assert choose("auto", wide) == "cudnn"
    monkeypatch.setattr(implementations, "capability", lambda: 8.0)
    assert choose("auto", wide) == "xla"
    assert gpu == [("bfloat16", 64, "whole"), ("bfloat16", 64, "odd"), ("bfloat16", 256, "causal")]


def test_a_length_cut_over_devices_is_not_for_cudnn(gpu):
    x = X.update(shape=(4, 32, 2, 64))
    with use(make_mesh({"data": 2, "fsdp": 2, "context": 2})):
        assert choose("auto", call(x)) == "triton"
        with pytest.raises(ValueError, match="cuts the length over context"):
            choose("cudnn", call(x, causal=False))


def test_an_explicit_choice_that_cannot_run_says_why(monkeypatch):
    x = jnp.zeros((1, 4, 1, 136))
    with pytest.raises(ValueError, match='head dim 136 is above 128; "xla" would work'):
        attention(x, x, x, implementation="triton")
    with pytest.raises(ValueError, match='needs a CUDA GPU and the backend is cpu; "xla" would'):
        attention(x, x, x, implementation="cudnn")
    x = x[..., :16].astype(jnp.int8)
    with pytest.raises(ValueError, match="q, k, v are int8, int8, int8; cast them to one of"):
        attention(x, x, x, implementation="triton")
    x = x.astype(jnp.float32)
    with pytest.raises(ValueError, match="float32, bfloat16, float32"):
        attention(x, x.astype(jnp.bfloat16), x, implementation="triton")
    load = implementations.load

    def gone(name):
        if name == "triton":
            raise ImportError("no module jax.experimental.pallas.triton")
        return load(name)

    monkeypatch.setattr(implementations, "load", gone)
    with pytest.raises(ValueError, match='lacks what it is written in .*; "xla" would work'):
        attention(x, x, x, implementation="triton")
    assert attention(x, x, x).shape == x.shape


@pytest.fixture
def in_place(monkeypatch):
    """Let a function stand in for cuDNN, on a GPU that is none; the probe is the real one."""

    def put(stands_in):
        flash_cudnn.trouble.cache_clear()
        monkeypatch.setattr(implementations, "capability", lambda: 9.0)
        monkeypatch.setattr(flash_cudnn, "flash_attention", stands_in)

    yield put
    flash_cudnn.trouble.cache_clear()


def test_the_probe_runs_once_within_a_trace_and_under_a_mesh(in_place):
    calls = []

    def stands_in(q, *rest, **options):
        calls.append(q.shape)
        return flash_xla.flash_attention(q, *rest, **options)

    in_place(stands_in)
    x = np.ones((2, 32, 2, 16), jnp.bfloat16)
    with use(make_mesh({"fsdp": 2}, jax.devices()[:2])):
        out = jax.jit(lambda x: attention(x, x, x, causal=False) + attention(x, x, x))(x)
    np.testing.assert_array_equal(np.asarray(out), 2 * x)  # equal values, weighed anyhow
    # The probe of each mask, then the calls themselves, on each device's rows.
    assert calls == [(1, 67, 2, 16), (1, 32, 2, 16)] * 2


def test_a_wrong_result_and_an_error_fail_the_probe(in_place, caplog):
    caplog.set_level(logging.INFO)
    in_place(lambda q, *rest, **options: flash_xla.flash_attention(1.1 * q, *rest, **options))
    assert "is off by" in flash_cudnn.trouble("bfloat16", 16, "causal")

    def broken(*_, **__):
        raise RuntimeError("no execution\n plans")

    in_place(broken)
    x = jax.ShapeDtypeStruct((1, 32, 2, 16), jnp.bfloat16)
    for _ in range(2):
        assert choose("auto", call(x)) == "triton"
    lines = [r.getMessage() for r in caplog.records if r.name == flash_cudnn.__name__]
    assert len(lines) == 2 and lines[1].endswith("RuntimeError: no execution plans")


@pytest.fixture
def some_cudnn(monkeypatch):
    """JAX asks which cuDNN is there before it traces; programs are only read here."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize(
    "causal, s, mask", [(True, 729, "CAUSAL"), (False, 801, "PADDING"), (False, 800, "NO_MASK")]
)
def test_it_lowers_to_cudnns_fused_calls_without_a_mask_as_an_array(some_cudnn, causal, s, mask):
    """Of odd lengths too, which JAX itself refuses where a gradient is asked for."""
    q, k = (jax.ShapeDtypeStruct((2, *x, 72), jnp.bfloat16) for x in ((729, 4), (s, 2)))

    def loss(q, k, v):
        out = flash_cudnn.flash_attention(q, k, v, None, None, causal=causal, scale=0.125)
        assert out.shape == q.shape
        return jnp.sum(out.astype(jnp.float32) ** 2)

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"__cudnn\$(\w+)", text)
    assert calls == ["fmhaSoftmax", "fmhaSoftmaxBackward"]  # no ScaleBias in their names
    assert re.findall(r"mask_type\W+22: \W+22(\w+?)\\22", text) == [mask] * 2
    assert not re.search(rf"(729|730)x({s}|{s + 1})x", text)


@pytest.mark.parametrize("causal, t, s", [(True, 19, 19), (False, 18, 13)])
def test_what_is_asked_of_cudnn_is_what_attention_means(monkeypatch, causal, t, s):
    """JAX's plain path in cuDNN's place: its causality, and the padding of odd lengths."""
    asked = jax.nn.dot_product_attention

    def plain(*arrays, implementation, **options):
        assert implementation == "cudnn" and not any(x.shape[1] % 2 for x in arrays)
        return asked(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    keys, shapes = jax.random.split(jax.random.key(0), 4), [(t, 4), (s, 2), (s, 2), (t, 4)]
    arrays = zip(keys, shapes, strict=True)
    q, k, v, grad = (jax.random.normal(key, (2, *shape, 8)) for key, shape in arrays)
    options = dict(causal=causal, scale=8**-0.5)

    @jax.jit
    def run(q, k, v, grad):
        attend = functools.partial(flash_cudnn.flash_attention, **options)
        out, pull = jax.vjp(lambda *x: attend(*x, None, None), q, k, v)
        return out, *pull(grad)

    start, end = np.zeros((2, t)), np.full((2, t), s)
    want = reference(q, k, v, start, end, causal)
    want = want, *reference_gradients(q, k, v, grad, start, end, causal)
    for got, right in zip(run(q, k, v, grad), want, strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5)


def test_rematerialisation_runs_cudnn_once(some_cudnn):
    x = jax.ShapeDtypeStruct((1, 16, 2, 64), jnp.bfloat16)

    def loss(q, k, v):
        run = functools.partial(flash_cudnn.flash_attention, causal=True, scale=0.125)
        return jnp.sum(run(jnp.sin(q), k, v, None, None).astype(jnp.float32) ** 2)

    def forwards(fn):
        text = str(jax.make_jaxpr(jax.grad(fn, (0, 1, 2)))(x, x, x))
        assert text.count("dot_product_attention_bwd_wrapper[") == 1
        return text.count("dot_product_attention_fwd_wrapper[")

    assert forwards(loss) == 1
    assert forwards(jax.checkpoint(loss, policy=stack.REMAT["names"])) == 1
    assert forwards(jax.checkpoint(loss, policy=stack.REMAT["full"])) == 2
