"""Media of MIMIC-IT as Otter's recipes read them, for the number of frames that they set."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_language_tokenizers import build_neox_tokenizer

from mmjax.config import resolve_recipe
from mmjax.data.catalog import make_sources
from mmjax.data.templates import TEMPLATES
from mmjax.models.flamingo.processor import FlamingoProcessor, ProcessorConfig
from mmjax.schema import to_dataclass
from mmjax.train.settings import RunSettings
from mmjax.types import BadSample

CONFIGS = Path(__file__).parents[3] / "configs"
SIDE = 4


def picture(level):
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (level, 0, 0)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def yaml(tmp_path):
    """A video of three frames, a picture, and a pair of pictures, each a dataset of its own."""
    ids = {"V": ["i0", "i1", "i2"], "S": ["i3"], "P": ["i1", "i3"]}
    (tmp_path / "images.json").write_text(json.dumps({f"i{n}": picture(n) for n in range(4)}))
    for name, some in ids.items():
        entry = dict(instruction="What?", answer="A dog.", image_ids=some, rel_ins_ids=[])
        (tmp_path / f"{name}.json").write_text(json.dumps({"meta": {}, "data": {name: entry}}))
    files = "{mimicit_path: %s.json, images_path: images.json}"
    (tmp_path / "train.yaml").write_text(
        f"VIDEO_TEXT:\n  V: {files % 'V'}\nIMAGE_TEXT:\n  S: {files % 'S'}\n  P: {files % 'P'}\n"
    )
    return tmp_path / "train.yaml"


def levels(recipe, yaml, *overrides):
    """The red levels of the frames of each dataset's media, or the reason why there are none."""
    given = [f"data.sources.train.path={yaml}", *overrides]
    settings = to_dataclass(RunSettings, resolve_recipe(CONFIGS / f"{recipe}.py", given))
    config = ProcessorConfig(image_size=SIDE, **settings.model.processor)
    processor, found = FlamingoProcessor(config, build_neox_tokenizer()), {}
    for name, source in make_sources(settings.data.sources).items():
        record = source[0]
        try:
            example = processor.encode(TEMPLATES[settings.data.template](record), record.images)
        except BadSample as error:
            found[name] = error.reason
            continue
        media = example["patches"].reshape(len(example["patches"]), -1, SIDE, SIDE, 3)
        found[name] = media[:, :, 0, 0, 0].tolist()
    return found


def test_a_video_models_media_have_all_its_frames(yaml):
    found = levels("otter_video", yaml)
    assert [len(media) for media in found.values()] == [1, 1, 1]
    assert [len(media[0]) for media in found.values()] == [32, 32, 32]
    assert [sorted({*media[0]}) for media in found.values()] == [[0, 1, 2], [3], [1, 3]]
    four = ("model.processor.frames=4", "data.sources.train.frames=4")
    assert levels("otter_video", yaml, *four)["V"] == [[0, 0, 1, 2]]


def test_a_pair_is_one_medium_and_never_two_that_hide_each_other(yaml):
    found = levels("otter_9b", yaml)
    assert found == {"V": "frame_count", "S": [[3]], "P": "frame_count"}
    two = ("model.processor.frames=2", "data.sources.train.frames=2")
    assert levels("otter_9b", yaml, *two) == {"V": [[0, 2]], "S": [[3, 3]], "P": [[1, 3]]}
