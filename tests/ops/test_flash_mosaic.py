"""Which calls the Mosaic kernels take, and what the others hear. The kernels need a newer jax:
tests/ops/conftest.py says from which on test_flash_mosaic_kernels.py runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.ops import flash_mosaic, implementations
from mmjax.ops.attention import attention
from mmjax.ops.implementations import Call, choose
from mmjax.parallel.mesh import make_mesh, use

X = jax.ShapeDtypeStruct((1, 32, 2, 64), jnp.bfloat16)


@pytest.fixture
def new_jax(monkeypatch):
    """Let a jax that is too old pass for one that is not: nothing is run here."""
    monkeypatch.setattr(flash_mosaic, "MIN_JAX", (0, 0))


@pytest.fixture
def gpu(monkeypatch):
    """Stand on a GPU; gives a function that sets its compute capability."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def put(capability):
        monkeypatch.setattr(implementations, "capability", lambda: capability)

    put(9.0)
    return put


def call(x=X, **changes):
    return Call(x, x, x, **changes)


def test_an_older_jax_hears_what_is_needed_and_what_works(monkeypatch):
    old = jax.__version_info__ < flash_mosaic.MIN_JAX
    assert (flash_mosaic.problem(call()) is None) == (not old)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    x = jnp.ones((1, 4, 1, 64), jnp.bfloat16)
    says = 'needs jax 0.11 or newer, thus Python 3.12, and this is jax 0.10.2; "xla" would work'
    with pytest.raises(ValueError, match=says):
        attention(x, x, x, implementation="mosaic")
    np.testing.assert_array_equal(attention(x, x, x), x)


def test_what_it_takes(new_jax, gpu):
    for x in (X, X.update(shape=(1, 7, 2, 128)), X.update(dtype=jnp.float16)):
        assert choose("mosaic", call(x, ranges=True, slopes=True)) == "mosaic"
        assert choose("mosaic", call(x, causal=False)) == "mosaic"


@pytest.mark.parametrize(
    "capability, x, says",
    [
        (8.0, X, "needs a Hopper GPU, of compute capability 9.0, and this one is of .* 8.0"),
        (10.0, X, "needs a Hopper GPU, of compute capability 9.0, and this one is of .* 10.0"),
        (None, X, "needs a Hopper GPU, of compute capability 9.0, and this one is another vendor"),
        (9.0, X.update(shape=(1, 32, 2, 80)), 'head dim 80 is none of 64, 128; "triton" or "xla"'),
        (9.0, X.update(dtype=jnp.float32), "float32, float32, float32; cast them to one of bfloat"),
    ],
)
def test_what_it_cannot_do_is_said(new_jax, gpu, capability, x, says):
    gpu(capability)
    with pytest.raises(ValueError, match=says):
        choose("mosaic", call(x, ranges=True))


def test_a_cuda_that_may_compile_it_wrongly_is_named(new_jax, gpu, monkeypatch):
    for version, says in ((12080, "CUDA 12080 may compile"), (12090, "CUDA 12090 may compile")):
        monkeypatch.setattr(flash_mosaic, "cuda_version", lambda version=version: version)
        assert says in flash_mosaic.problem(call())
    for version in (12060, 13000, None):
        monkeypatch.setattr(flash_mosaic, "cuda_version", lambda version=version: version)
        assert flash_mosaic.problem(call()) is None


def test_off_a_gpu_it_takes_no_mesh(new_jax):
    with use(make_mesh({"fsdp": 2}, jax.devices()[:2])):
        assert "the mesh has 2" in flash_mosaic.problem(call())


def test_auto_never_takes_it(new_jax, gpu):
    assert "mosaic" not in implementations.PREFERRED
    assert choose("auto", call(ranges=True)) == "triton"
