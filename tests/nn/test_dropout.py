"""What a decoder drops in training, by value; the masks as functions of a key and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models.decoder import Decoder
from mmjax.nn.dropout import drop, dropout_key, of_layer
from mmjax.nn.linear import DTypes
from mmjax.parallel.mesh import make_mesh, use
from tests import tiny

ONES = jnp.ones((4, 32, 64))


def test_a_share_is_dropped_the_rest_scaled_and_nothing_outside_of_training():
    with dropout_key(jax.random.key(0)):
        got = np.asarray(drop(ONES, 0.25, "x"))
        np.testing.assert_array_equal(drop(ONES, 0.0, "x"), ONES)
        half = drop(ONES.astype(jnp.bfloat16), 0.5, "x")
    np.testing.assert_allclose(np.unique(got), [0, 4 / 3], rtol=1e-6)
    assert abs((got == 0).mean() - 0.25) < 0.02  # 8192 draws: a standard deviation of 0.005
    assert half.dtype == jnp.bfloat16 and set(np.unique(half).tolist()) == {0, 2}
    np.testing.assert_array_equal(drop(ONES, 0.25, "x"), ONES)


def test_bfloat16_rounds_what_is_kept_and_not_the_factor():
    """1 / 0.9 in bfloat16 is 0.16 % too small."""
    x = jnp.arange(128, 256, dtype=jnp.bfloat16)
    with dropout_key(jax.random.key(0)):
        got = drop(x, 0.1, "x")
    kept = np.asarray(got) > 0
    want = jnp.asarray(np.arange(128, 256) / 0.9, jnp.bfloat16)
    np.testing.assert_array_equal(got[kept], want[kept])


def test_a_mask_is_its_own_by_step_layer_and_name_and_the_same_again():
    def mask(step, layer, name):
        with dropout_key(jax.random.fold_in(jax.random.key(0), step)), of_layer(layer):
            return np.asarray(drop(ONES, 0.5, name)) > 0

    first = mask(3, 0, "attn.out")
    np.testing.assert_array_equal(mask(3, 0, "attn.out"), first)
    for other in (mask(4, 0, "attn.out"), mask(3, 1, "attn.out"), mask(3, 0, "mlp.out")):
        assert abs((other == first).mean() - 0.5) < 0.03


def test_masks_do_not_depend_on_the_mesh():
    def run(x):
        with dropout_key(jax.random.key(5)):
            return drop(x, 0.5, "x")

    want = np.asarray(jax.jit(run)(ONES))
    with use(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})) as mesh:
        x = jax.device_put(np.asarray(ONES), jax.NamedSharding(mesh, jax.P("fsdp", "context")))
        np.testing.assert_array_equal(np.asarray(jax.jit(run)(x)), want)


@pytest.mark.heavy
@pytest.mark.parametrize("residual", ["sequential", "shared"])
def test_states_asked_for_are_those_of_the_whole_row(residual):
    """The last layer's masks too, though it runs on those positions alone."""
    c = dataclasses.replace(
        tiny.CONFIG.decoder, residual=residual, residual_dropout=0.3, embedding_dropout=0.2
    )
    assert c.trims_last_layer(2 / 16)
    decoder = Decoder(c, dtypes=DTypes(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 16, c.d_model))
    positions, at = jnp.arange(16)[None].repeat(2, 0), jnp.array([[3, 15], [0, 8]])

    @jax.jit
    def run(key):
        with dropout_key(key):
            whole, asked = (decoder(x, positions, at=a)[0] for a in (None, at))
        return jnp.take_along_axis(whole, at[..., None], 1), asked, decoder(x, positions, at=at)[0]

    whole, asked, off = run(jax.random.key(7))
    np.testing.assert_allclose(asked, whole, atol=1e-5)
    assert np.abs(np.asarray(asked - off)).max() > 0.5
