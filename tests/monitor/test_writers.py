import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest

from mmjax.monitor import writers
from mmjax.types import MMJaxError


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
    second.sample(3, "note", {"input": "hello"})
    second.close()
    read = writers.read_metrics(path)
    assert read["train/lr"] == [(1, 1e-3)]
    assert read["train/loss"][:2] == [(1, 2.5), (2, 1.5)]
    assert read["train/loss"][2][0] == 3 and math.isnan(read["train/loss"][2][1])
    assert "note" not in read
    rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(r)["step"] for r in rows] == [1, 2, 2, 3]


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
    main.sample(1, "samples", {"input": "a"})
    main.close()
    assert (tmp_path / "a" / "metrics.jsonl").exists()
    events = list((tmp_path / "a" / "tensorboard").glob("events.*"))
    assert len(events) == 1 and events[0].stat().st_size > 0


def test_read_metrics_of_a_run_without_any(tmp_path):
    assert writers.read_metrics(tmp_path / "none.jsonl") == {}


def test_not_a_scalar_is_an_error(tmp_path):
    with pytest.raises(TypeError):
        writers.JsonlWriter(tmp_path / "m.jsonl").scalars(1, {"a": np.zeros(2)})


def events(folder, begun=None):
    """(step, name, value) of every summary in TensorBoard files: number, text, bytes.

    begun: a list that gets the steps from which on readers drop what was written before.
    """
    import struct

    from tensorboardX.proto import event_pb2

    found = []
    for file in folder.iterdir():
        data = file.read_bytes()
        while data:
            size = struct.unpack("<Q", data[:8])[0]  # length, its checksum, event, its checksum
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START and begun is not None:
                begun.append(event.step)
            for value in event.summary.value:
                text = b"".join(value.tensor.string_val).decode()
                other = value.image.encoded_image_string or text
                found.append((event.step, value.tag, other or round(value.simple_value, 6)))
    return found


def test_tensorboard_files_are_written_without_loading_torch(tmp_path):
    code = (
        "import sys; from mmjax.monitor.writers import TensorboardWriter as Writer\n"
        f"writer = Writer({str(tmp_path)!r}); writer.scalars(2, {{'train/loss': 0.5}})\n"
        "assert 'torch' not in sys.modules; import importlib.util as util\n"
        "assert util.find_spec('torch')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert events(tmp_path) == [(2, "train/loss", 0.5)]


def test_all_places_get_the_same_names(tmp_path, monkeypatch):
    """W&B is played by an object that keeps what it is given."""
    told = []
    run = types.SimpleNamespace(
        log=told.append, define_metric=lambda *a, **k: None, finish=lambda: told.append("end")
    )
    started = []
    fake = types.SimpleNamespace(
        init=lambda **options: started.append(options) or run,
        Image=lambda pixels: pixels.shape,
        Html=lambda page: page,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first in (0, 2):
        about = dict(name="a", config={"lr": 0.1}, first=first)
        writer = writers.make_writer(tmp_path, wandb="lab", **about)
        writer.scalars(3, {"train/loss": 0.5, "train/loss/vqa": 0.25})
        writer.sample(3, "samples", {"input": "<image> a\n# b", "labels": ""})
        writer.close()
    page = told[1].pop("samples")
    assert told[1] == {"step": 3}
    assert "<b>input</b>" in page and ">&lt;image&gt; a\n# b</pre>" in page  # tokens, not tags
    assert "<b>labels</b>" in page
    assert told[0] == {"step": 3, "train/loss": 0.5, "train/loss/vqa": 0.25} and "end" in told
    assert started[0] == started[1]  # the same id: the run is continued
    assert (started[0]["project"], started[0]["name"], started[0]["resume"]) == (
        "lab",
        "a",
        "allow",
    )
    wanted = [(3, "train/loss", 0.5), (3, "train/loss/vqa", 0.25)]
    text = (3, "samples/text_summary", "**input**\n\n    <image> a\n    # b\n\n**labels**\n\n")
    begun = []
    assert set(events(tmp_path / "tensorboard", begun)) == {*wanted, text}
    assert 3 in begun  # a run that is continued writes step 3 again
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0]) == told[0] and len(rows) == 2


def test_a_dead_wandb_ends_no_run(tmp_path, monkeypatch):
    def dead(*_):
        raise Exception("the backend has shut down")

    run = types.SimpleNamespace(log=dead, define_metric=lambda *a, **k: None, finish=dead)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    writer, told = writers.make_writer(tmp_path, tensorboard=False, wandb="lab"), []
    writer.warn = told.append
    for step in (1, 2):
        writer.scalars(step, {"train/loss": 0.5})
    writer.close()
    assert len(told) == 1 and "W&B: the backend has shut down. Training goes on" in told[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MMJaxError, match=r"log.wandb is 'lab'.*mmjax\[wandb\]"):
        writers.make_writer(tmp_path, wandb="lab")


def test_pictures_go_to_tensorboard(tmp_path):
    writer = writers.make_writer(tmp_path)
    writer.picture(5, "data/batch", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    step, name, data = events(tmp_path / "tensorboard")[0]
    assert (step, name) == (5, "data/batch") and data.startswith(b"\x89PNG")


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    told = []
    writer = writers.make_writer(tmp_path)
    writer.warn = told.append
    for step in (1, 2):
        writer.scalars(step, {"x": 1.0})
    assert len(told) == 1 and "JsonlWriter could not write step 1" in told[0]
    assert "No space left" in told[0]
    assert events(tmp_path / "tensorboard") == [(1, "x", 1.0), (2, "x", 1.0)]
    writer.close()


@pytest.mark.parametrize("left", ["", "\n"])
def test_an_id_that_a_kill_has_left_empty_is_drawn_anew(tmp_path, monkeypatch, left):
    """wandb refuses an empty one, and the workdir could never be started again."""
    ids = []

    def init(**given):
        ids.append(given["id"])
        return types.SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (tmp_path / "wandb_id").write_text(left)
    for _ in range(2):
        writers.make_writer(tmp_path, tensorboard=False, wandb="lab").close()
    assert len(ids[0]) == 16 and ids[0] == ids[1]
