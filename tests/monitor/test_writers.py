import json
import math

import numpy as np
import pytest

from mmjax.monitor import writers


def test_jsonl_appends_after_a_torn_line_and_the_last_value_counts(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    first = writers.JsonlWriter(path)
    first.scalars(1, {"train/loss": np.float32(2.5), "train/lr": 1e-3})
    first.scalars(2, {"train/loss": 2.0})
    first.close()
    with open(path, "a") as f:
        f.write('{"step": 3, "train/lo')  # killed in the middle of a line
    second = writers.JsonlWriter(path)
    second.scalars(2, {"train/loss": 1.5})
    second.scalars(3, {"train/loss": float("nan")})
    second.text(3, "note", "hello")
    second.close()
    read = writers.read_metrics(path)
    assert read["train/lr"] == [(1, 1e-3)]
    assert read["train/loss"][:2] == [(1, 2.5), (2, 1.5)]
    assert read["train/loss"][2][0] == 3 and math.isnan(read["train/loss"][2][1])
    assert "note" not in read
    rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(r)["step"] for r in rows] == [1, 2, 2, 3, 3]


def test_each_line_is_on_disk_before_the_next(tmp_path):
    writer = writers.JsonlWriter(tmp_path / "m.jsonl")
    writer.scalars(7, {"a": 1})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 7, "a": 1}


def test_make_writer_writes_both_on_process_0_only(tmp_path):
    other = writers.make_writer(tmp_path / "b", process=1)
    other.scalars(1, {"x": 1.0})
    other.close()
    assert not (tmp_path / "b").exists()
    main = writers.make_writer(tmp_path / "a")
    main.scalars(1, {"x": 1.0})
    main.text(1, "config", "{}")
    main.close()
    assert (tmp_path / "a" / "metrics.jsonl").exists()
    events = list((tmp_path / "a" / "tensorboard").glob("events.*"))
    assert len(events) == 1 and events[0].stat().st_size > 0


def test_read_metrics_of_a_run_without_any(tmp_path):
    assert writers.read_metrics(tmp_path / "none.jsonl") == {}


def test_not_a_scalar_is_an_error(tmp_path):
    with pytest.raises(TypeError):
        writers.JsonlWriter(tmp_path / "m.jsonl").scalars(1, {"a": np.zeros(2)})
