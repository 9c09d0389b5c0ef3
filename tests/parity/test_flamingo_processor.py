"""Our CLIP pixels beside the peers', bit for bit: open_clip's transform and transformers' own.

open_clip's (torchvision) through recorded arrays, which tests/golden says how to make;
transformers' CLIPImageProcessor live, in its Pillow form.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_language_tokenizers import build_llama_tokenizer, build_neox_tokenizer
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmjax.models.flamingo.processor import FlamingoProcessor, ProcessorConfig

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from make_flamingo_processor_goldens import SIDE, SIZES, picture  # noqa: E402

IDS = {"media_token_id": 1}


def pixels(image, **options):
    """Our normalised pixels of one picture, float32[3,side,side]."""
    config = ProcessorConfig(**IDS, **options)
    rows = FlamingoProcessor(config).encode_prompt([1], [image])["patches"]
    assert rows.dtype == np.uint8
    side = config.image_size
    return config.normalise(rows.reshape(side, side, 3)).transpose(2, 0, 1)


@pytest.mark.parametrize("width, height", SIZES)
def test_equal_to_open_clips_transform(width, height):
    with np.load(GOLDEN / "flamingo_processor.npz") as arrays:
        want = arrays[f"{width}x{height}"]
    np.testing.assert_array_equal(pixels(picture(width, height), image_size=SIDE), want)


@pytest.mark.parametrize(
    "width, height", [*SIZES, (224, 227), (500, 333), (1, 3), (225, 224), (451, 448), (1024, 768)]
)
@pytest.mark.parametrize("side", [20, 224])
def test_equal_to_transformers_image_processor(width, height, side):
    image = Image.fromarray(picture(width, height))
    square = {"height": side, "width": side}
    peer = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size=square, do_rescale=False, do_normalize=False
    )
    want = peer(image)["pixel_values"][0]
    config = ProcessorConfig(image_size=side, fit="crop_down", **IDS)
    rows = FlamingoProcessor(config).encode_prompt([1], [image])["patches"]
    np.testing.assert_array_equal(rows.reshape(side, side, 3).transpose(2, 0, 1), want)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_other_modes_become_rgb_as_transformers_makes_them(mode):
    image = Image.fromarray(picture(90, 50)).convert(mode)
    got = pixels(image, image_size=SIDE, fit="crop_down")
    square = {"height": SIDE, "width": SIDE}
    want = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)(image)
    np.testing.assert_allclose(got, want["pixel_values"][0], atol=1e-6)


FOLDERS = [
    dict(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}),
    dict(size={"shortest_edge": 28}, crop_size={"height": 20, "width": 20}),
    dict(size={"height": 20, "width": 20}, do_center_crop=False),
    dict(size={"height": 20, "width": 20}, crop_size={"height": 20, "width": 20}),
    dict(
        size={"shortest_edge": 20},
        crop_size={"height": 20, "width": 20},
        image_mean=[0.481, 0.458, 0.408],  # Otter's rounded ones
        image_std=[0.269, 0.261, 0.276],
        resample=2,
    ),
]


@pytest.mark.parametrize("settings", FOLDERS)
def test_a_folder_of_transformers_is_read_and_written_back(tmp_path, settings):
    peer = CLIPImageProcessorPil(**settings)
    peer.save_pretrained(tmp_path)
    ours = FlamingoProcessor.from_pretrained(tmp_path)
    ours = ours.with_options(**IDS)
    image = picture(90, 51)
    want = peer(Image.fromarray(image))["pixel_values"][0]

    def made(processor):
        rows = processor.encode_prompt([1], [image])["patches"].reshape(20, 20, 3)
        return processor.config.normalise(rows).transpose(2, 0, 1)

    np.testing.assert_allclose(made(ours), want, atol=1e-6)
    ready = ours.encode_prompt([1], [want])["patches"]  # the peer's own tensor
    np.testing.assert_array_equal(ready.reshape(20, 20, 3), want.transpose(1, 2, 0))
    ours.save_pretrained(tmp_path / "again")
    back = CLIPImageProcessorPil.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(back(Image.fromarray(image))["pixel_values"][0], want)
    again = FlamingoProcessor.from_pretrained(tmp_path / "again").config
    assert again == FlamingoProcessor.from_pretrained(tmp_path).config


@pytest.mark.parametrize("build", [build_neox_tokenizer, build_llama_tokenizer])
def test_a_saved_tokenizer_gives_transformers_the_same_ids(tmp_path, build):
    ours = FlamingoProcessor(ProcessorConfig(image_size=20, answer_token=True), build())
    ours.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "<image>User: what is it? GPT:<answer> A red dog.<|endofchunk|>"
    tokens = ours.encode_prompt(text, [picture(20, 20)])["tokens"].tolist()
    assert theirs(text)["input_ids"] == tokens
    assert theirs.decode(tokens, skip_special_tokens=True).split() == (
        ["User:", "what", "is", "it?", "GPT:", "A", "red", "dog."]
    )
    assert (theirs.pad_token_id, theirs.eos_token_id) == (
        ours.config.pad_token_id,
        ours.config.eos_token_id,
    )


def test_sizes_and_ids_come_from_config_json_without_other_files(tmp_path):
    about = {
        "vision_config": {"image_size": 336},
        "media_token_id": 9,
        "eoc_token_id": 8,
        "text_config": {"eos_token_id": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    config = FlamingoProcessor.from_pretrained(tmp_path).config
    assert (config.image_size, config.fit, config.frames) == (336, "crop", 1)
    assert (config.media_token_id, config.eoc_token_id, config.eos_token_id) == (9, 8, 2)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224, "crop_size": 224}')
    config = FlamingoProcessor.from_pretrained(tmp_path).config  # CLIPFeatureExtractor's form
    assert (config.image_size, config.shortest_edge, config.fit) == (224, None, "crop_down")
