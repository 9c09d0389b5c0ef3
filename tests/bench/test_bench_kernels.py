"""The attention, loss, probe and shard suites: exact counts, both sides' values, their rows."""

import dataclasses

import jax
import numpy as np
import pytest

from bench import kernels, kernels_ours, kernels_torch, probe, report, runner, shard
from bench.cases import TINY


def case_of(cases, *words):
    return next(c for c in cases if all(word in c.name for word in words))


ATTENTION = kernels.attention_cases(True, "cpu")
LOSS = kernels.loss_cases(True, "cpu")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_work_counts_the_visible_pairs(device):
    for case in kernels.attention_cases(False, device):
        o = case.options
        lengths = o["documents"] or [o["t"]]
        assert sum(lengths) == o["t"]
        if o["t"] <= 4096:
            segments = np.repeat(np.arange(len(lengths)), lengths)
            seen = np.count_nonzero(np.tri(o["t"], dtype=bool) & (segments[:, None] == segments))
            flops = seen * o["b"] * o["n"] * o["h"] * (14 if o["backward"] else 4)
            assert case.work * (1e12 if device == "gpu" else 1e9) == pytest.approx(flops, rel=1e-12)
    targets = [c.target for c in kernels.attention_cases(False, "cpu") if c.target]
    assert targets == [0.8] * 4  # T 1024 and 4096, heads of 64 and 32, forward + backward


def test_both_sides_of_packed_attention_equal_float64():
    case = case_of(ATTENTION, "packed", "backward")
    inputs = kernels.attention_inputs(case)
    arrays = [np.float64(inputs[name]) for name in ("q", "k", "v", "cotangent")]
    parts, first = [], 0
    for length in case.options["documents"]:
        parts.append(probe.reference(*(x[:, first : first + length] for x in arrays)))
        first += length
    expected = dict(
        zip(("out", "dq", "dk", "dv"), map(np.hstack, zip(*parts, strict=True)), strict=True)
    )
    ours = [kernels_ours.Attention(case, "", "xla").outputs()]
    peers = [kernels_torch.Attention(case, "", impl).outputs() for impl in case.peers]
    for outputs in ours + peers:
        assert outputs.keys() == expected.keys()
        for name, value in outputs.items():
            np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


def test_bfloat16_on_both_sides_stays_in_its_bound():
    case = case_of(ATTENTION, "causal", "backward")
    case = dataclasses.replace(case, options=case.options | {"dtype": "bfloat16"})
    ours = kernels_ours.Attention(case, "", "triton").outputs()
    peer = kernels_torch.Attention(case, "", "sdpa").outputs()
    errors = runner.parity("attention", ours, peer)
    assert 1e-5 < max(errors.values()) < kernels.BOUNDS["bfloat16"]
    assert {x.dtype.name for x in (*ours.values(), *peer.values())} == {"float32"}


@pytest.mark.parametrize("name", ["answers", "every token"])
def test_both_sides_of_the_loss_equal_float64(name):
    case = case_of(LOSS, name)
    inputs = kernels.loss_inputs(case)
    hidden, head = np.float64(inputs["hidden"]), np.float64(inputs["head"])
    index, labels = inputs["index"], inputs["labels"]
    scores = np.exp(hidden[index] @ head)
    p = scores / scores.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    expected = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    d_hidden = np.zeros_like(hidden)
    d_hidden[index] = p @ head.T / len(labels)
    d_head = hidden[index].T @ p / len(labels)
    subjects = [kernels_ours.Loss(case, "", "")]
    subjects += [kernels_torch.Loss(case, "", impl) for impl in case.peers]
    for subject in subjects:
        found = subject.outputs()
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)
        np.testing.assert_allclose(found["hidden"], d_hidden, atol=1e-6)
        np.testing.assert_allclose(found["head"], d_head, atol=1e-6)
    assert subjects[0].details["temp_size_in_bytes"] > 0


def test_parity_is_over_the_largest_value_and_a_nan_fails():
    ours = {"out": np.array([1.0, 3.0]), "dq": np.array([0.5, np.nan])}
    peer = {"out": np.array([1.0, 4.0]), "dq": np.array([0.5, 0.5])}
    errors = runner.parity("attention", ours, peer)
    assert errors["out"] == 0.25
    verdict = runner._verdict(ATTENTION[0], errors)
    assert np.isnan(verdict["parity_err"]) and verdict["parity_ok"] is False


def test_the_probe_measures_an_attention_or_says_why_not():
    found = probe.attention_errors("xla", ("float32",), (24,))
    plain, packed = found["attention"]["xla"].items()
    assert plain[0] == "float32" and packed[0] == "float32, packed, head dim 24"
    assert 0 < plain[1] < 2e-6 and 0 < packed[1] < 2e-6
    assert found["errors"] == found["attention"]["xla"]
    found = probe.attention_errors("cudnn", ("float32",), ())
    assert found.keys() == {"attention"}  # nothing to compare
    assert "cannot run: it needs a CUDA GPU" in found["attention"]["cudnn"]["float32"]


@pytest.mark.heavy
def test_a_mesh_gives_its_collectives_bytes_and_the_losses_of_one_device(monkeypatch):
    # Its process compiles into the cache of the whole suite (tests/conftest.py).
    for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
        monkeypatch.setenv(name.upper(), str(getattr(jax.config, name)))
    case = case_of(shard.shard_cases(True, "cpu"), "tensor")
    assert case.size == TINY and case.device == "8 cpus"
    (found,) = runner.run_cases([case], peer="torch", quick=True)
    assert found["parity_ok"] and 0 < found["parity_err"] <= shard.BOUND
    assert found["env"]["versions"].keys() == {"ours"}  # no peer was started
    assert found["losses"][0] > found["losses"][1] > 0
    assert found["collectives"]["all-reduce"] > 0 and found["collectives"]["all-gather"] > 0
    # An eighth of the parameters in float32, and of their two moments, at the least.
    parameters = report._parameters(dataclasses.asdict(TINY))
    assert parameters * 12 / 8 < found["argument_size_in_bytes"] < parameters * 12
    assert found["temp_size_in_bytes"] > 0


def test_collectives_are_counted_once_each():
    program = """
      %all-gather.1 = f32[8]{0} all-gather(%p), dimensions={0}
      %ar = (f32[8]{0}, f32[4]{0}) all-reduce-start(%all-gather.1, %x), to_apply=%add
      %ar.done = (f32[8]{0}, f32[4]{0}) all-reduce-done(%ar)
      %rs = f32[1]{0} reduce-scatter(%ar.done), metadata={op_name="all-to-all("}
    """
    assert shard.count_collectives(program) == {
        "all-gather": 1, "all-reduce": 1, "reduce-scatter": 1, "collective-permute": 0,
        "all-to-all": 0,
    }  # fmt: skip
