"""Flamingo beside OpenFlamingo's own code, for each language model and interval.

Reads the five committed goldens; `make parity-flamingo` makes all fifteen and runs this on them.
"""

import numpy as np
import pytest

from tests.parity import flamingo_golden


@pytest.fixture(scope="module", params=flamingo_golden.paths(), ids=lambda path: path.stem)
def golden(request):
    """Return one run of the peer."""
    return flamingo_golden.load(request.param)


def test_the_golden_is_whole(golden):
    """Every trained tensor has a gradient that is not zero, and the loss is that of the logits."""
    assert set(golden.trained) <= set(golden.weights)
    assert not [k for k, g in golden.gradients.items() if not g.any()]
    assert not [k for k, norm in golden.gradient_norms.items() if not norm > 0]
    logits, labels = golden.logits[:, :-1].astype(np.float64), golden.labels[:, 1:]
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    targets = labels != -100
    chosen = np.take_along_axis(logits, np.where(targets, labels, 0)[..., None], -1)[..., 0]
    assert golden.loss == pytest.approx((log_sum - chosen)[targets].mean(), rel=1e-6)


def test_cross_attention_stands_where_the_interval_says(golden):
    layers = {int(k.split(".")[-3]) for k in golden.weights if k.endswith(".attn_gate")}
    assert layers == {i for i in range(4) if (i + 1) % golden.every == 0}
