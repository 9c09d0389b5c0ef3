"""Our adapters as PEFT's: what its pairs add to each module, and which modules it finds."""

import math
import re

import numpy as np
import pytest

from mmjax.types import MMJaxError
from mmjax.weights import operations as O
from mmjax.weights import rules as R
from mmjax.weights.peft import PREFIX, export_adapter
from mmjax.weights.writer import Arrays

QKV, GU = ("layers.q", "layers.k", "layers.v"), ("layers.gate", "layers.up")
RULES = (
    *(R.Rule(f"{x}.kernel", "l.{l}.qkv.weight", O.Fused(i)) for i, x in enumerate(QKV)),
    *(R.Rule(f"{x}.kernel", "l.{l}.gu.weight", O.Chunk(i)) for i, x in enumerate(GU)),
    R.Rule("layers.o.kernel", "l.{l}.o.weight", O.reshape_in(2)),
    R.Rule("layers.norm.scale", "l.{l}.norm.weight"),
    R.Rule("tower.up.kernel", "v.{l}.gu.weight", O.transpose),
    R.Rule("cross.up.kernel", "x.ff.1.weight", O.transpose),
    R.Rule("head.kernel", "head.weight", O.transpose),
)
# Of two layers, after them the axes in and the axes out.
SHAPES = {
    **dict.fromkeys(QKV, ((2,), (6,), (2, 3))),
    **dict.fromkeys(GU, ((2,), (6,), (4,))),
    "layers.o": ((2,), (2, 3), (6,)),
    "cross.up": ((), (6,), (4,)),
    "head": ((), (6,), (5,)),
}
MODULES = [
    *(f"m.l.{i}.{x}" for i in (0, 1) for x in ("qkv", "gu", "o")),
    *(f"m.v.{i}.gu" for i in (0, 1)),
    *("m.x.ff.1", "m.x.ff.11", "m.x.ffx1", "m.head", "m.1"),
]


def adapters(maps, rank, alike=()):
    """Return lora_a and lora_b by name, ``alike`` with the same A, and what they add unscaled."""
    rng, arrays, added = np.random.default_rng(0), {}, {}
    first = rng.normal(size=(2, 6, rank)).astype(np.float32)
    for name in maps:
        lead, d_in, d_out = SHAPES[name]
        a = rng.normal(size=(*lead, *d_in, rank)).astype(np.float32)
        a = first if name in alike else a
        b = rng.normal(size=(*lead, rank, *d_out)).astype(np.float32)
        arrays |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        each = zip(a, b, strict=True) if lead else [(a, b)]
        kernel = np.stack([np.tensordot(x, y, 1) for x, y in each])
        added[f"{name}.kernel"] = kernel if lead else kernel[0]
    return arrays, added


def of(patterns, module, default):
    """What PEFT takes for a module: the first pattern that its name ends with, else the default."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "maps, alike, wide, targets",
    [
        (
            (*QKV, *GU, "layers.o", "cross.up", "head"),
            GU,
            {"qkv": 3},
            r"(.*\.)?(ff\.1|head|l\.\d+\.gu|o|qkv)",
        ),
        (("layers.q", "layers.v", "cross.up"), (), {"qkv": 2}, ["ff.1", "qkv"]),
        ((*QKV, *GU), QKV, {r"l\.\d+\.gu": 2}, r"(.*\.)?(l\.\d+\.gu|qkv)"),
        (QKV, QKV[:2], {"qkv": 3}, ["qkv"]),
    ],
)
def test_pairs_add_what_ours_add_to_their_modules_and_to_no_others(
    rslora, maps, alike, wide, targets
):
    """q, k and v that have come apart share a pair of rank 3 r; so do a gate and its up."""
    arrays, added = adapters(maps, 2, alike)
    options = dict(rank=2, alpha=3.5, rslora=rslora, dropout=0.1, base="hub", task=None)
    tensors, about = export_adapter(RULES, Arrays(arrays), rename="m.{}".format, **options)
    assert (about["r"], about["lora_alpha"], about["lora_dropout"]) == (2, 3.5, 0.1)
    assert (about["use_rslora"], about["task_type"]) == (rslora, None)
    assert about["rank_pattern"] == {name: 2 * times for name, times in wide.items()}
    assert about["target_modules"] == targets
    got = {t.key.removeprefix(PREFIX): t.make() for t in tensors}
    want = {f"m.{t.key}": t.make() for t in R.export(RULES, Arrays(added))}
    found = set()
    for key, delta in want.items():
        module = key.removesuffix(".weight")
        a, b = got.pop(f"{module}.lora_A.weight"), got.pop(f"{module}.lora_B.weight")
        rank, alpha = of(about["rank_pattern"], module, 2), of(about["alpha_pattern"], module, 3.5)
        assert len(a) == rank
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        ours = 3.5 / (math.sqrt(2) if rslora else 2)
        np.testing.assert_allclose(scale * b @ a, ours * delta, rtol=1e-4, atol=1e-5)
        found.add(module)
    assert not got
    if isinstance(targets, str):
        assert {m for m in MODULES if re.fullmatch(targets, m)} == found
    else:
        assert {m for m in MODULES if m.endswith(tuple(f".{x}" for x in targets))} == found


def test_whole_numbers_are_written_as_such_and_none_without_adapters():
    arrays, _ = adapters(["head"], 4)
    _, about = export_adapter(RULES, Arrays(arrays), rank=4, alpha=8.0, rename=str)
    assert repr(about["lora_alpha"]) == "8" and about["task_type"] == "CAUSAL_LM"
    with pytest.raises(MMJaxError, match="no LoRA parameters"):
        export_adapter(RULES, Arrays({}), rank=4, alpha=8.0, rename=str)


def test_adapters_of_convolutions_are_refused_with_the_way_out():
    """A tower's patch map, which ``lora.targets=("*",)`` takes too, is one in the peer."""
    rules = (*RULES, R.Rule("vision.embed.kernel", "patch.weight", O.conv_patch))
    arrays, _ = adapters(("head",), 2)
    arrays |= {"vision.embed.lora_a": np.zeros((2, 2, 3, 2)), "vision.embed.lora_b": np.eye(2, 4)}
    says = "vision.embed is a convolution in PyTorch.*without --adapter, or leave it out of lora"
    with pytest.raises(MMJaxError, match=says):
        export_adapter(rules, Arrays(arrays), rank=2, alpha=2.0, rename=str)
