"""S2 against the wrapper in Bunny's repository (tests/golden/make_bunny_s2_goldens.py says how)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.bunny import s2
from mmjax.types import MMJaxError
from tests.parity.flamingo_golden import relative_error

GOLDEN = np.load(Path(__file__).parents[1] / "golden/bunny_s2.npz")
TILE, PATCH, SCALES = 21, 7, (21, 42, 63)


@jax.jit
def run(kernel, images, probe):
    def tower(kernel, x):
        side = TILE // PATCH
        grid = x.reshape(-1, side, PATCH, side, PATCH, 3)
        return jnp.einsum("nyixjc,ijcd->nyxd", grid, kernel).reshape(len(x), side**2, -1)

    def loss(kernel):
        out = s2.s2_features(lambda x: tower(kernel, x), images, SCALES, TILE)
        return (out * probe).sum(), out

    return jax.grad(loss, has_aux=True)(kernel)


@pytest.mark.parametrize("side", [63, 50])  # the largest scale; odd ratios, up and down
def test_features_equal_the_peers(side):
    a = {name: GOLDEN[f"{side}/{name}"] for name in ("images", "out", "probe", "g_tower")}
    grad, out = run(GOLDEN["tower"], a["images"].astype(np.float32) / 64, a["probe"])
    assert relative_error(np.asarray(out), a["out"]) <= 1e-5
    assert relative_error(np.asarray(grad), a["g_tower"]) <= 1e-4


def test_the_tower_runs_once_over_all_tiles_in_the_order_of_samples():
    """A batch cut over devices stays cut: the tiles of a sample stand together."""
    calls = []

    def tower(x):
        calls.append(x.shape)
        return jnp.broadcast_to(x[:, :1, :1, 0], (len(x), 4, 1))

    images = jnp.broadcast_to(jnp.arange(2.0).reshape(2, 1, 1, 1), (2, 12, 12, 3))
    out = s2.s2_features(tower, images, (12, 4, 8), 4)
    assert calls == [(28, 4, 4, 3)] and s2.num_tiles((12, 4, 8), 4) == 14
    np.testing.assert_allclose(out, np.broadcast_to([[[0]], [[1]]], (2, 4, 3)), atol=1e-6)


@pytest.mark.parametrize("scales", [(384, 700), (768, 1152), ()])
def test_scales_that_the_tower_cannot_take_are_refused(scales):
    with pytest.raises(MMJaxError, match="takes 384 pixels; give 384 and multiples"):
        s2.check_scales(scales, 384)
