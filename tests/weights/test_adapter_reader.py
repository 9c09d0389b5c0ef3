"""An adapter of several ranks and scales, in some layers: what it adds to each kernel."""

import math
from pathlib import Path

import numpy as np
import pytest

from mmjax.types import MMJaxError
from mmjax.weights import operations as O
from mmjax.weights.adapter_reader import AdapterReader
from mmjax.weights.rules import Rule
from mmjax.weights.writer import Arrays

RULES = (
    Rule("layers.q.kernel", "l.{l}.q.weight", O.transpose),
    Rule("layers.k.kernel", "l.{l}.k.weight", O.transpose),
    Rule("head.kernel", "head.weight", O.transpose),
)
SHAPES = {"layers.q.kernel": (2, 3, 4), "layers.k.kernel": (2, 3, 4), "head.kernel": (3, 5)}


def pairs(**ranks):
    """Return A [rank, 3] and B [out, rank] of some modules."""
    rng, out = np.random.default_rng(0), {}
    for name, rank in ranks.items():
        name = name.replace("_", ".")
        width = 5 if name == "head" else 4
        out[f"{name}.lora_A.weight"] = rng.normal(size=(rank, 3)).astype(np.float32)
        out[f"{name}.lora_B.weight"] = rng.normal(size=(width, rank)).astype(np.float32)
    return out


@pytest.mark.parametrize("rslora", [False, True])
def test_each_module_adds_what_peft_adds(rslora):
    arrays = pairs(l_0_q=3, l_1_q=2, head=1) | {"head.modules_to_save.weight": np.ones((5, 3))}
    patterns = {"d": 9, "head": 6, "h.*": 7, "1.q": 4}  # the first that fits, of whole words
    about = {"r": 2, "use_rslora": rslora, "alpha_pattern": patterns}  # else an alpha of 8
    got = AdapterReader(Arrays(arrays), about | {"lora_dropout": 0.1}, RULES, SHAPES)
    assert got.kernels == ["layers.q.kernel", "head.kernel"]
    assert (got.rank, got.rslora, got.dropout) == (3, rslora, 0.1)
    assert got.alpha == pytest.approx(got.scale * (math.sqrt(3) if rslora else 3))
    # What no rule knows is there to be refused, and a module beside ours is none.
    names = {f"{m}.lora_{x}.weight" for m in ("l.0.q", "l.1.q", "head") for x in "AB"}
    assert set(got.keys()) == names | {"head.modules_to_save.weight"}
    assert got.shape("head.modules_to_save.weight") == (5, 3)
    for name, rank, alpha in (("l.0.q", 3, 8), ("l.1.q", 2, 4), ("head", 1, 6)):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        low, high = got.read(a), got.read(b)
        assert low.shape == got.shape(a) == (3, 3) and high.shape == got.shape(b)
        want = alpha / (math.sqrt(rank) if rslora else rank) * arrays[b] @ arrays[a]
        np.testing.assert_allclose(got.scale * high @ low, want, rtol=1e-5)
        assert np.array_equal(got.read(b, (slice(1, 3),)), high[1:3])


def test_a_layer_that_is_left_out_adds_nothing():
    arrays = pairs(l_1_k=2)
    got = AdapterReader(Arrays(arrays), {"r": 4, "lora_alpha": 2}, RULES, SHAPES)
    assert (got.rank, got.scale, got.kernels) == (2, 1.0, ["layers.k.kernel"])
    assert got.shape("l.0.k.lora_B.weight") == (4, 2)
    assert not got.read("l.0.k.lora_A.weight").any() and not got.read("l.0.k.lora_B.weight").any()
    assert np.array_equal(got.read("l.1.k.lora_B.weight"), arrays["l.1.k.lora_B.weight"])


def test_pairs_of_a_map_that_is_never_used_are_left_out():
    arrays = pairs(l_1_k=2, pool_q=7)
    got = AdapterReader(Arrays(arrays), {"r": 2}, RULES, SHAPES, unused=(r"^pool\.",))
    assert (got.rank, got.kernels) == (2, ["layers.k.kernel"])


@pytest.mark.parametrize(
    "arrays, says",
    [
        (pairs(l_0_q=2, l_9_q=2), "of its 2 modules 1 are none of this model's, first l.9.q"),
        ({"head.lora_A.weight": np.ones((2, 3))}, "head.lora_B.weight is missing"),
        (pairs(head=2) | {"head.lora_A.weight": np.ones((2, 4))}, r"\[5, 4\].*this .* \[5, 3\]"),
        (pairs(head=2) | {"head.lora_B.weight": np.ones((4, 2))}, r"\[4, 3\].*this .* \[5, 3\]"),
    ],
)
def test_an_adapter_of_another_model_is_refused(arrays, says):
    reader = Arrays(arrays)
    reader.files = [Path("a/adapter_model.safetensors")]
    with pytest.raises(MMJaxError, match=says):
        AdapterReader(reader, {}, RULES, SHAPES)


@pytest.mark.parametrize(
    "about, says",
    [
        ({"peft_type": "IA3"}, "a IA3 adapter; only LORA"),
        ({"init_lora_weights": "LoftQ"}, "init_lora_weights 'LoftQ'"),
        *(({name: True}, name) for name in ("fan_in_fan_out", "lora_bias", "use_qalora")),
    ],
)
def test_what_is_no_plain_pair_is_refused(about, says):
    with pytest.raises(MMJaxError, match=says):
        AdapterReader(Arrays(pairs(head=2)), about, RULES, SHAPES)
