"""nf4 kernels: bitsandbytes' codes, sizes that are no whole blocks, and stacked layers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import nf4

GOLDEN = Path(__file__).parent.parent / "golden" / "nf4_bitsandbytes.npz"


def test_codes_and_maxima_are_those_of_bitsandbytes():
    golden = np.load(GOLDEN)
    codes, largest = nf4.quantize(golden["weight"].T, (0,))
    np.testing.assert_array_equal(codes, golden["codes"].T)
    np.testing.assert_array_equal(largest, golden["maxima"].T)
    values = nf4.dequantize(codes, largest, (192,), 0, "float32")
    np.testing.assert_array_equal(values, golden["values"].T)


@pytest.mark.parametrize("inputs, stacked", [((80,), ()), ((5, 27), (2,)), ((2, 64), (3,))])
def test_any_inputs_are_rounded_to_the_nearest_value_of_their_block(inputs, stacked):
    """Inputs that are no multiple of 64, an odd number of them, heads, and layers in front."""
    shape = (*stacked, *inputs, 3)
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    at, size = len(stacked), int(np.prod(inputs))
    axes = tuple(range(at, at + len(inputs)))
    codes, largest = nf4.quantize(kernel, axes)
    assert codes.dtype == np.uint8 and codes.shape == (*stacked, -(-size // 2), 3)
    assert largest.dtype == np.float32 and largest.shape == (*stacked, -(-size // 64), 3)
    values = np.asarray(nf4.dequantize(codes, largest, inputs, at, jnp.float32))
    assert values.shape == shape
    flat, got = (x.reshape(-1, size, 3) for x in (kernel, values))
    for start in range(0, size, 64):
        block = flat[:, start : start + 64]
        scale = np.abs(block).max(1, keepdims=True)
        nearest = np.abs(block[..., None] - scale[..., None] * nf4.VALUES).argmin(-1)
        np.testing.assert_allclose(
            got[:, start : start + 64], nf4.VALUES[nearest] * scale, rtol=1e-6
        )
