"""The conversion there and back: what it measures, and that it would notice a change."""

import json

import pytest

from bench import convert
from mmjax.weights import writer
from mmjax.weights.reader import open_reader
from mmjax.weights.rules import Tensor


@pytest.mark.heavy
def test_a_quick_run_measures_and_nothing_changes(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    argv = ["--quick", "--layers", "2", "--dir", str(tmp_path), "--out", str(out)]
    assert convert.main(argv) == 0
    row = json.loads(out.read_text())
    assert row["changed"] == [] and row["layers"] == 2
    # vocabulary twice, patches, two layers and the last norm
    layer = 4 * 64 * 64 + 4 * 64 + 2 * 64 * 128 + 128 + 64 + 4 * 64 + 4 * 16
    assert row["parameters"] == 2 * 512 * 64 + 2700 * 64 + 64 + 2 * layer + 2 * 64
    assert 0.05 < row["to_jax"]["peak_gb"] < 2 and 0.05 < row["to_hf"]["peak_gb"] < 2
    assert "| 2 | " in capsys.readouterr().out


def test_a_changed_tensor_is_named(tmp_path):
    convert.write_checkpoint(tmp_path / "a", **convert.TINY, num_layers=1)
    a = open_reader(tmp_path / "a")
    (tmp_path / "b").mkdir()
    changed = "language_model.model.final_layernorm.bias"

    def tensor(key):
        value = a.read(key)
        return Tensor(key, a.shape(key), a.dtype(key), lambda: value + (key == changed))

    writer.write_shards(tmp_path / "b", [tensor(key) for key in a.keys()])  # noqa: SIM118
    assert convert.different(tmp_path / "a", tmp_path / "b") == [changed]
    assert convert.different(tmp_path / "a", tmp_path / "a") == []
