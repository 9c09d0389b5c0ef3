"""Examples chosen by their pictures, beside OpenFlamingo's own RICES and transformers' CLIP."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel

from mmjax.evals import rices
from mmjax.evals.few_shot import Demonstrations
from mmjax.evals.predictions import predictions_path, read_predictions
from mmjax.evals.runner import evaluate
from mmjax.evals.tasks import vqa
from mmjax.models.clip import open_clip
from mmjax.models.normalisation import CLIP_MEAN, CLIP_STD
from mmjax.train import tasks
from mmjax.train.settings import EvalSettings, RunSettings
from mmjax.types import Message, MMJaxError, Record
from tests.parity import vision_peer
from tests.parity.flamingo_golden import COMMITTED

COMMITTED_OR_NEW = Path(os.environ.get("FLAMINGO_GOLDENS", COMMITTED))
GOLDEN = np.load(COMMITTED_OR_NEW / "rices.npz")  # make_rices_golden.py says how
PICTURES = [GOLDEN[f"picture/{i}"] for i in range(46)]
EXAMPLES, QUESTIONS = PICTURES[:40], PICTURES[40:]
TOWER = dict(image_size=28, patch_size=14, width=16, layers=2, head_width=8)
OPEN_CLIP = dict(embed_dim=24, quick_gelu=True, vision_cfg=TOWER)


def solved(picture, name):
    messages = (Message("user", "<image>What?"), Message("assistant", str(name)))
    return Record(messages, () if picture is None else (picture,), {"id": f"r{name}"})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The peer's CLIP in a folder as open_clip pushes one to a hub."""
    folder = tmp_path_factory.mktemp("clip")
    marked = [key for key in GOLDEN.files if key.startswith("weight/")]
    weights = {key.removeprefix("weight/"): GOLDEN[key] for key in marked}
    text = {"token_embedding.weight": np.zeros((64, 16), np.float32)}  # a whole CLIP has it
    save_file(weights | text, folder / "open_clip_model.safetensors")
    said = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def encoder(clip):
    return open_clip(clip).load()


def test_directions_and_choices_equal_the_peers(encoder, tmp_path):
    source = [solved(picture, i) for i, picture in enumerate(EXAMPLES)]
    likeness = rices.find_likeness(encoder, source, folder=tmp_path)
    np.testing.assert_allclose(likeness.directions, GOLDEN["features"], atol=2e-6)
    demos = Demonstrations(source, shots=5, likeness=likeness)
    for i, picture in enumerate(QUESTIONS):
        asked = demos.before(solved(picture, f"q{i}"), i)
        answers = [m.text for m in asked.messages if m.role == "assistant"]
        assert answers == [*map(str, GOLDEN["found"][i]), f"q{i}"]  # the most like one last


def test_a_lone_file_needs_its_config_and_gives_the_same(clip, encoder, tmp_path):
    file = clip / "open_clip_model.safetensors"
    with pytest.raises(MMJaxError, match="its heads cannot be read off its tensors"):
        open_clip(file)
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(OPEN_CLIP))
    assert open_clip(file, asked=str(config)).load().fingerprint == encoder.fingerprint


def test_a_clip_of_transformers_sees_as_it_does_there(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        vision_config=sizes | dict(image_size=28, patch_size=14),
        text_config=sizes | dict(vocab_size=8, max_position_embeddings=4),
        projection_dim=20,
    )
    peer = vision_peer.random_peer(CLIPModel, config)
    peer.save_pretrained(tmp_path)
    encoder = open_clip(tmp_path).load()
    levels = np.random.default_rng(0).integers(0, 256, (64, 28, 28, 3), dtype=np.uint8)
    with torch.no_grad():
        x = encoder.images.normalise(levels)
        want = peer.get_image_features(pixel_values=vision_peer.pixels(x))
    want = getattr(want, "pooler_output", want).numpy()
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    np.testing.assert_allclose(encoder(list(levels)), want, atol=2e-6)
    np.testing.assert_allclose(encoder(list(x)), want, atol=2e-6)  # normalised beforehand
    picture = Image.fromarray(np.repeat(levels[0], 2, axis=0))
    assert encoder.images.pixels(picture).shape == (28, 28, 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 24, "crop_size": 24}))
    with pytest.raises(MMJaxError, match="makes pictures of 24 pixels and the tower takes 28"):
        open_clip(tmp_path)


def test_what_compares_no_pictures_is_refused_by_name(clip, tmp_path):
    weights = {key.removeprefix("weight/"): GOLDEN[key] for key in GOLDEN.files if "weight/" in key}
    del weights["visual.proj"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(OPEN_CLIP))
    with pytest.raises(MMJaxError, match="lacks visual.proj, as open_clip names it"):
        open_clip(tmp_path)
    for said, named in (
        ({"interpolation": "random"}, "interpolation 'random'"),
        ({"resize_mode": "squash"}, "resize_mode 'squash'"),
    ):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "model.safetensors").write_bytes(
            (clip / "open_clip_model.safetensors").read_bytes()
        )
        text = json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": said})
        (other / "open_clip_config.json").write_text(text)
        with pytest.raises(MMJaxError, match=named):
            open_clip(other)


class Counted:
    """An encoder that counts the batches it sees."""

    def __init__(self, encoder):
        self.images, self.fingerprint, self.batches = encoder.images, encoder.fingerprint, 0
        self.encoder = encoder

    def __call__(self, pixels):
        self.batches += 1
        return self.encoder(pixels)


def test_pictures_are_seen_once_and_kept_for_another_run(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(rices, "CHUNK", 64)
    files = []
    for i, picture in enumerate(EXAMPLES[:6]):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(picture).save(files[-1])
    source = [solved(files[i // 20], i) for i in range(120)]  # 20 questions of a picture
    source += [solved(picture, 120 + i) for i, picture in enumerate(EXAMPLES[6:])]
    counted = Counted(encoder)
    seen = rices.find_likeness(counted, source, folder=tmp_path / "kept")
    assert counted.batches == 1 and len(seen.directions) == 40
    assert list(seen.shown[0]) == [*range(20)] and list(seen.shown[-1]) == [153]
    again = rices.find_likeness(counted, source, folder=tmp_path / "kept")
    assert counted.batches == 1
    np.testing.assert_array_equal(again.directions, seen.directions)
    # The questions of one picture come together, in their order.
    order = list(seen.order(solved(files[2], "q")))
    assert order[:20] == [*range(40, 60)] and sorted(order) == [*range(154)]
    Image.fromarray(EXAMPLES[9]).save(files[3])  # another picture under the same name
    changed = rices.find_likeness(counted, source, folder=tmp_path / "kept")
    assert counted.batches == 3  # one of them the question's own
    np.testing.assert_allclose(changed.directions[3], changed.directions[9], atol=1e-6)
    for batches, left in ((4, 200), (5, 0)):  # as by a full disk, or a host that lost its power
        for kept in (tmp_path / "kept").iterdir():
            kept.write_bytes(kept.read_bytes()[:left])
        for _ in range(2):
            once_more = rices.find_likeness(counted, source, folder=tmp_path / "kept")
        assert counted.batches == batches
    np.testing.assert_array_equal(once_more.directions, changed.directions)


def test_what_cannot_be_seen_is_never_shown(encoder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures = [EXAMPLES[0], None, str(tmp_path / "absent.png"), str(tmp_path / "broken.png"),
                (EXAMPLES[1], EXAMPLES[2]), EXAMPLES[0]]  # fmt: skip
    source = [solved(picture, i) for i, picture in enumerate(pictures)]
    likeness = rices.find_likeness(encoder, source, folder=tmp_path)
    assert list(likeness.order(solved(EXAMPLES[1], "q"))) == [4, 0, 5]  # of a video its first frame
    own = dataclasses.replace(solved(EXAMPLES[1], "q"), meta={"id": "r4"})
    shown = Demonstrations(source, shots=2, likeness=likeness).before(own, 0)
    assert [m.text for m in shown.messages if m.role == "assistant"] == ["5", "0", "q"]
    with pytest.raises(MMJaxError, match="2 of 6 records can be shown before record r4"):
        Demonstrations(source, shots=3, likeness=likeness).before(own, 0)
    with pytest.raises(MMJaxError, match="record rq has no picture to find examples by"):
        likeness.order(solved(None, "q"))
    with pytest.raises(MMJaxError, match="none of the 3 records that examples are taken from"):
        rices.find_likeness(encoder, source[1:4], folder=tmp_path)
    assert rices.find_likeness(encoder, source, folder=tmp_path, stop=lambda: True) is None
    with_file = tmp_path / "file"
    with_file.write_text("")  # no folder can be made there: nothing is kept, nothing is lost
    assert len(rices.find_likeness(encoder, source, folder=with_file / "x").directions) == 2


def settings_of(task):
    return RunSettings(eval=EvalSettings(tasks=(task,), template="fuyu_prompt"))


def test_a_task_asks_behind_the_examples_that_are_most_alike(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = [solved(picture, i) for i, picture in enumerate(EXAMPLES)]
    questions = [solved(picture, f"q{i}") for i, picture in enumerate(QUESTIONS)]
    questions.append(solved(None, "q6"))
    asked = []

    def answer(records, resolution, max_new_tokens):
        asked.extend(records)
        return [r.messages[-1].text for r in records]

    task = vqa("alike", questions, shots=5, demos=source, rices=f"{clip}/")
    tasks.check_tasks(settings_of(task))
    found = evaluate([task], answer, workdir=tmp_path, progress=False)["alike"]["test"]
    assert (found["rices"], found["shots"], found["correct"], found["n"]) == (clip.name, 5, 6, 7)
    shown = [[m.text for m in r.messages if m.role == "assistant"][:-1] for r in asked]
    assert shown == [list(map(str, row)) for row in GOLDEN["found"]]
    rows = read_predictions(predictions_path(tmp_path, "alike"))
    assert "record rq6 has no picture" in rows[6]["error"]
    assert len(list((tmp_path / "cache/mmjax/rices").iterdir())) == 1
    assert evaluate([task], answer, progress=False, stop=lambda: True) == {}
    absent = dataclasses.replace(task, rices=str(tmp_path / "no_clip.pt"))
    with pytest.raises(MMJaxError, match=r"no_clip.pt"):  # before a model is loaded
        tasks.check_tasks(settings_of(absent))
