"""The suites of Fuyu-8B: both sides agree on toy sizes; what a GPU would run, a CPU would not."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from bench import __main__ as cli
from bench import cases, fuyu8b, report, runner

ON_GPU = fuyu8b.train_cases(False, "gpu") + fuyu8b.decode_cases(False, "gpu")
*_, PACKED, WHOLE = fuyu8b.train_cases(True, "cpu")
(DECODE,) = fuyu8b.decode_cases(True, "cpu")


@pytest.fixture(scope="module")
def rows():
    """The rows of a quick run beside the peer's plain form, compiled into the suite's own cache."""
    chosen = [dataclasses.replace(PACKED, peers=(fuyu8b.SDPA,)), WHOLE, DECODE]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
            patch.setenv(name.upper(), str(getattr(jax.config, name)))
        return list(runner.run_cases(chosen, peer="torch", quick=True))


@pytest.mark.heavy
def test_a_packed_row_is_the_peers_batch_and_answers_are_the_same(rows):
    packed, whole, decode = rows
    for row in (packed, decode):
        assert "error" not in row and row["parity_ok"] and row["ratio"] > 0, row
    assert packed["parity_err"] < 1e-5 and decode["parity_err"] == 0
    assert packed["trained"] < packed["parameters"] / 2
    assert whole["parity_ok"] is None and whole["ratio"] is None and whole["ours_ms"] > 0
    assert whole["trained"] == whole["parameters"]
    text = report.markdown(rows, "c", "r")
    assert "## Train step of Fuyu-8B" in text and "## Generation of Fuyu-8B" in text
    assert "does not count," not in text  # as the list of missed targets says it


def test_a_packed_batch_holds_the_rows_of_the_peers():
    o, batch = PACKED.options, fuyu8b.train_batch(PACKED)
    plain = cases.train_batch(PACKED)
    assert batch["tokens"].shape == (1, o["row"])
    for row in range(o["b"]):
        span = slice(row * o["t"], (row + 1) * o["t"])
        np.testing.assert_array_equal(batch["tokens"][0, span], plain["tokens"][row])
        np.testing.assert_array_equal(batch["positions"][0, span], np.arange(o["t"]))
        assert set(batch["segment_ids"][0, span]) == {row + 1}
        shown = batch["visual_index"][0, span]
        seen = batch["patches"][0][shown[shown >= 0]]
        np.testing.assert_array_equal(seen, plain["patches"][row])
    ends = batch["target_index"].reshape(o["b"], -1) - o["t"] * np.arange(o["b"])[:, None]
    np.testing.assert_array_equal(ends, plain["target_index"])
    rest = batch["segment_ids"][0, o["b"] * o["t"] :]
    assert len(rest) and not rest.any()


def test_on_a_gpu_the_model_is_fuyu_8b_and_a_cpu_is_refused(capsys):
    for case in ON_GPU:
        assert case.size == fuyu8b.FUYU_8B and case.options["dtype"] == "bfloat16"
        assert fuyu8b.compared(case).size == fuyu8b.SMALL and case.device.startswith("gpu")
        assert cases.Case.from_json(json.loads(json.dumps(case.to_json()))).size == case.size
    assert report._parameters(dataclasses.asdict(fuyu8b.FUYU_8B)) == 9_408_238_592
    with pytest.raises(SystemExit):
        cli.parse(["--suite", "train,train_8b", "--device", "cpu"])
    assert "train_8b needs a GPU" in capsys.readouterr().err


def test_patches_go_by_the_name_that_the_peers_forward_has(monkeypatch):
    """Transformers 5.17 has image_patches, and takes whatever else it is given without a word."""
    import transformers

    from bench import torch_peer

    for name in ("image_patches", "pixel_values"):
        forward = eval(f"lambda self, input_ids, {name}=None, **others: None")
        monkeypatch.setattr(transformers.FuyuForCausalLM, "forward", forward)
        assert torch_peer.with_patches({"input_ids": 1}, 2) == {"input_ids": 1, name: 2}


def test_the_peers_config_states_its_width_where_5_17_looks_for_it():
    from bench import torch_peer

    config = torch_peer.fuyu_config(fuyu8b.SMALL)
    assert config.hidden_size == config.text_config.hidden_size == fuyu8b.SMALL.d
