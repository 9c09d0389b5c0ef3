"""Bad input through the user's door: one clear message that names the thing and the fix."""

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import mmjax
from convert_weights import inspect, to_hf, to_jax
from mmjax.checkpoint import CheckpointManager
from mmjax.checkpoint_steps import find_step
from mmjax.cli import run_guarded
from mmjax.parallel.mesh import make_mesh
from mmjax.train import loop
from mmjax.train.settings import (
    CheckpointSettings,
    DataSettings,
    LogSettings,
    ModelSettings,
    RunSettings,
)  # fmt: skip
from mmjax.types import MMJaxError

ROOT = Path(__file__).parents[2]
SIZES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=8
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))


def picture(form, size=(24, 16), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def turns(answer="red"):
    return [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": answer}]


def write_data(folder, bad=()):
    """Eight good records, and the bad ones; returns the path of the JSONL file."""
    folder.mkdir()
    for i in range(8):
        form = ("JPEG", "PNG")[i % 2]
        (folder / f"{i}.{form.lower()}").write_bytes(picture(form, seed=i))
    (folder / "cut.jpeg").write_bytes(picture("JPEG", (32, 32))[:-300])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 20)
    (folder / "wide.png").write_bytes(picture("PNG", (400, 16)))
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    (folder / "bomb.png").write_bytes(bomb.getvalue())
    lines = [
        json.dumps({"id": f"good{i}", "image": f"{i}.{('jpeg', 'png')[i % 2]}",
                    "conversations": turns()})
        for i in range(8)
    ]  # fmt: skip
    file = folder / "train.jsonl"
    file.write_text("\n".join([*lines, *bad]) + "\n")
    return file


def record(name, image=None, answer="red"):
    return json.dumps({"id": name, "image": image, "conversations": turns(answer)})


BAD = (
    record("cut", "cut.jpeg"),
    record("broken", "broken.png"),
    record("gone", "nowhere.png"),
    record("wide", "wide.png"),
    record("bomb", "bomb.png"),
    record("empty", "0.jpeg", answer=" "),
    '{"id": "field", "image": "0.jpeg", "conversations": [{"from": "human", "valeu": "hm"}]}',
    '{"id": "json", "image": ',
)


def settings(file, **data):
    return RunSettings(
        steps=10,
        model=ModelSettings(
            config=SIZES, words=("what is it? red", "User: Assistant:"), dtype="float32",
            frozen_dtype="float32",
        ),
        data=DataSettings(
            sources={"train": {"kind": "json", "path": str(file)}}, seq_len=48, max_patches=24,
            max_targets=8, batch_size=2, **data,
        ),
        checkpoint=CheckpointSettings(every=10, export=False),
        log=LogSettings(every=10, tensorboard=False),
    )  # fmt: skip


def test_bad_samples_are_skipped_counted_and_listed(tmp_path, capsys):
    file = write_data(tmp_path / "data", BAD)
    metrics = loop.run(settings(file, max_bad_share=0.9), tmp_path / "run")
    assert np.isfinite(metrics["train/loss"])
    # A person who never opens the list is told, too: on the terminal and in the metrics.
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "left out" in x]
    share = re.match(r"(\d+) of (\d+) samples \([\d.]+%\) left out: .*corrupt_image \d+", line)
    assert metrics["train/skipped"] == int(share[1]) / int(share[2]) > 0.3
    assert line.endswith(f"; each record is in {tmp_path}/run/skipped.jsonl")
    # Two packed rows of 48 tokens hold samples of 15 or 20 of them.
    assert 2 <= metrics["perf/sample_s"] * metrics["perf/step_s"] <= 6
    rows = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows) == len(BAD)  # each once
    expected = {
        "cut": ("corrupt_image", "cut.jpeg"),
        "broken": ("corrupt_image", "broken.png"),
        "gone": ("missing_image", "nowhere.png"),
        "wide": ("too_long", "max_tokens"),
        "bomb": ("image_too_large", "bomb.png"),
        "empty": ("empty_answer", "empty"),
    }
    for name, (reason, says) in expected.items():
        assert found[name]["reason"] == reason and says in found[name]["message"], found[name]
    rest = [row["message"] for name, row in found.items() if name not in expected]
    assert any((f"{file}:15" in m and "valeu" in m) or "conversations[0].value" in m for m in rest)
    assert any(f"{file}:16" in m and "JSON" in m for m in rest), rest


@pytest.mark.heavy
def test_the_run_fails_above_the_configured_share(tmp_path):
    file = write_data(tmp_path / "data", BAD)
    with pytest.raises(MMJaxError) as error:
        loop.run(
            dataclasses.replace(settings(file, max_bad_share=0.3), steps=200), tmp_path / "run"
        )
    text = str(error.value)
    assert "training samples were unusable" in text and "allowed 30.0%" in text
    assert "max_bad_share" in text and "skipped.jsonl" in text and "corrupt_image" in text


def test_an_error_behind_a_save_loses_nothing_of_it(tmp_path, monkeypatch):
    """A save goes on in the background, and the end of the process would cut it off."""
    waited, wait, take = [], CheckpointManager.wait, loop.Training._next_batch

    def noted(self):
        waited.append(self._saving and self._saving[0])
        wait(self)

    def once(self, step):
        if step:
            raise MMJaxError("no further batch")
        return take(self, step)

    monkeypatch.setattr(CheckpointManager, "wait", noted)
    monkeypatch.setattr(loop.Training, "_next_batch", once)
    run = settings(write_data(tmp_path / "data"))
    every = dataclasses.replace(run, checkpoint=CheckpointSettings(every=1, export=False))
    with pytest.raises(MMJaxError, match="no further batch"):
        loop.run(every, tmp_path / "run")
    assert waited == [None, 1] and find_step(tmp_path / "run")[1] == 1


def test_data_without_one_good_sample_ends_at_once(tmp_path):
    file = write_data(tmp_path / "data")
    file.write_text("\n".join(BAD) + "\n")
    with pytest.raises(MMJaxError, match="training samples were unusable"):
        loop.run(settings(file, max_bad_share=0.5), tmp_path / "run")


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.json", '[{"id": 1}, {"id": 2', ["a.json:1", "column"]),
        ("a.json", '{"id": 1}', ["a.json:1", ".jsonl"]),
        ("b.jsonl", None, ["b.jsonl"]),
    ],
)
def test_data_that_cannot_be_opened_is_named(tmp_path, name, text, says):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(MMJaxError) as error:
        loop.run(settings(file), tmp_path / "run")
    for part in says:
        assert part in str(error.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A trained model folder and its hub export."""
    folder = tmp_path_factory.mktemp("model")
    plain = settings(write_data(folder / "data"))
    plain = dataclasses.replace(
        plain, steps=1, checkpoint=CheckpointSettings(every=1), mesh={"fsdp": 1}
    )
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))
        loop.run(plain, folder / "run")
    to_hf.main([str(folder / "run/model"), str(folder / "hf")])
    return folder / "run/model", folder / "hf"


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: picture("JPEG", (64, 64))[:-300], ["cannot be read as an image", "replace"]),
        (lambda: b"no picture", ["cannot be read as an image"]),
        (lambda: "/nowhere/a.png", ["/nowhere/a.png"]),
        (lambda: Image.new("1", (12_000, 12_000)), ["144000000 pixels", "limit"]),
    ],
    ids=["truncated", "garbage", "missing", "bomb"],
)
def test_a_bad_picture_in_a_prompt_is_named(exported, make, says):
    model = mmjax.load(exported[0])
    with pytest.raises(MMJaxError) as error:
        model.generate("what is it?", make(), max_new_tokens=1)
    for part in says:
        assert part in str(error.value)


def edited(exported, tmp_path, edit):
    """A copy of the hub export with edited tensors."""
    folder = tmp_path / "edited[/b]"  # brackets in a path are no markup
    shutil.copytree(exported[1], folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_missing_unexpected_and_misshapen_keys_stand_in_one_error(exported, tmp_path, capsys):
    def edit(tensors):
        del tensors["language_model.lm_head.weight"]
        tensors["language_model.extra.weight"] = np.zeros(3, np.float32)
        tensors["vision_embed_tokens.bias"] = np.zeros(7, np.float32)

    folder = edited(exported, tmp_path, edit)
    names = ("language_model.lm_head.weight", "language_model.extra.weight")
    for call in (
        lambda: mmjax.load(folder),
        lambda: to_jax.main([str(folder), str(tmp_path / "out")]),
    ):
        with pytest.raises(MMJaxError) as error:
            call()
        for part in (*names, "vision_embed_tokens.bias", "1 missing", "1 unexpected", "7", "32"):
            assert part in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()
    assert inspect.main([str(folder)]) == 2
    shown = capsys.readouterr().out
    assert "language_model.extra" in shown and "edited[/b]" in shown.replace("\n", "")


def test_a_vocabulary_of_another_model_is_refused(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported[1], folder)
    config = json.loads((folder / "config.json").read_text())
    small = 64

    def shrink(tree):
        for key, value in tree.items():
            if isinstance(value, dict):
                shrink(value)
            elif key == "vocab_size":
                tree[key] = small

    shrink(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MMJaxError, match=r"the tokenizer has \d+ tokens but .* vocab_size is 64"):
        mmjax.load(folder)


def test_a_half_written_destination_is_not_a_model(exported, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(exported[0], folder)
    (folder / "config.json").unlink()
    for call in (
        lambda: mmjax.load(folder),
        lambda: to_hf.main([str(folder), str(tmp_path / "o")]),
    ):
        with pytest.raises(MMJaxError, match="half-written") as error:
            call()
        assert "run the conversion again" in str(error.value)


def test_an_existing_destination_is_not_overwritten_unasked(exported, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/precious.txt").write_text("mine")
    with pytest.raises(MMJaxError, match="there"):
        to_hf.main([str(exported[0]), str(tmp_path / "there")])
    assert (tmp_path / "there/precious.txt").read_text() == "mine"


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_runs_something_is_refused_and_not_run(tmp_path, capsys):
    mark = tmp_path / "it_ran"
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"weight": Evil(mark)}))
    for module in (to_jax, inspect):
        arguments = [str(tmp_path)] + ([str(tmp_path / "out")] if module is to_jax else [])
        assert run_guarded(lambda: module.main(arguments)) == 2  # noqa: B023
        message = capsys.readouterr().err
        assert message.startswith("error:") and "pytorch_model.bin" in message, message
    assert not mark.exists()


def test_real_commands_end_with_one_message_and_exit_code_2(exported, tmp_path):
    commands = [
        (["train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}/x",
          "--config.optim.lern=1"], ["optim.lern", "did you mean 'lr'?"]),
        (["train.py", "--config=configs/quickstart.py:quick", "--workdir="],
         ["--workdir is empty"]),
        (["eval.py", "--config=configs/quickstart.py:quick", "--checkpoint=/nowhere/run"],
         ["/nowhere/run", "give a workdir"]),
    ]  # fmt: skip
    for command, says in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr and "error:" in done.stderr
        for part in says:
            assert part in done.stderr
