"""Our processor beside transformers' own FuyuProcessor: ids bit for bit, patches to a grey level.

Two peers: the torchvision one through recorded arrays (tests/golden says how they are made), and
the Pillow one live, which needs a bridge because its patchify takes numpy and FuyuProcessor hands
it tensors.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import build_tiny_tokenizer
from transformers import FuyuProcessor as PeerProcessor
from transformers.image_utils import SizeDict
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from mmjax.data.images import fit_size
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.flamingo.media import media_rows
from mmjax.models.flamingo.processor_config import ProcessorConfig as MediaConfig
from mmjax.models.fuyu.processor import FuyuProcessor, ProcessorConfig
from mmjax.models.square_images import SquareImages
from mmjax.types import BadSample

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden", "fuyu_processor.npz")
PROMPT = "Generate a coco-style caption.\n"
SMALL = ProcessorConfig(patch_size=8, max_height=64, max_width=96)
PROMPTS = [
    "what colour is the circle?\n",
    "is there a red triangle?",
    " leading, trailing and  double spaces ",
    "unseen: naïve 漢字 🙂 \\n\t|NEWLINE|",
    "1",
]


class BridgedImageProcessor(FuyuImageProcessorPil):
    """The peer's torchvision-free image processor, usable inside its FuyuProcessor."""

    def patchify_image(self, image, patch_size=None):
        return torch.from_numpy(super().patchify_image(image.numpy(), patch_size))


def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def picture(width, height):
    return np.random.default_rng(width * 1000 + height).integers(
        0, 256, (height, width, 3), np.uint8
    )


def peer_processor(tokenizer):
    image_processor = BridgedImageProcessor(
        size={"height": 64, "width": 96}, patch_size={"height": 8, "width": 8}
    )
    return PeerProcessor(image_processor, tokenizer)


@pytest.mark.parametrize(
    "name", ["whole_patches", "ragged", "exactly_the_box", "too_wide", "too_large", "too_tall"]
)
def test_equal_to_the_torchvision_processor(name):
    arrays = golden()
    processor = FuyuProcessor(SMALL, build_word_tokenizer([PROMPT]))
    example = processor.encode_prompt(PROMPT, [arrays[f"{name}/image"]])
    np.testing.assert_array_equal(example["tokens"], arrays[f"{name}/ids"])
    difference = example["patches"].astype(int) - arrays[f"{name}/patches"]
    assert np.abs(difference).max() <= (1 if name.startswith("too") else 0)


def test_grids_of_fuyu_8b_equal_the_torchvision_processors():
    arrays = golden()
    processor = FuyuProcessor()
    for (width, height), (rows, cols) in zip(
        arrays["table/sizes"], arrays["table/grids"], strict=True
    ):
        assert processor.image_tokens(int(width), int(height)) == rows * (cols + 1)


@pytest.mark.parametrize("size", [(48, 32), (90, 50), (9, 5), (96, 64), (200, 150), (20, 170)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_equal_to_the_live_processor(size, prompt):
    tokenizer = build_tiny_tokenizer()
    image = picture(*size)
    out = peer_processor(tokenizer)(images=image, text=prompt, return_legacy_image_output=False)
    example = FuyuProcessor(SMALL, tokenizer).encode_prompt(prompt, [image])
    np.testing.assert_array_equal(example["tokens"], out["input_ids"][0].numpy())
    assert not example["loss_mask"].any()
    floats = SMALL.normalise(example["patches"].reshape(-1, 3)).reshape(example["patches"].shape)
    level = 2 / 255 if size[0] > 96 or size[1] > 64 else 0  # one grey level where it is resized
    difference = np.abs(floats - out["pixel_values"].numpy())
    assert difference.max() <= level + 1e-6


def test_scale_and_fitted_size_equal_the_live_image_processor():
    processor = FuyuProcessor(SMALL)
    for size in [(90, 50), (200, 150), (131, 97), (20, 170)]:
        out = BridgedImageProcessor(
            size={"height": 64, "width": 96}, patch_size={"height": 8, "width": 8}
        )(picture(*size))
        assert processor.image_scale(picture(*size)) == out["image_scale_factors"][0][0]


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(5, 60), st.integers(5, 60))
def test_fitted_size_equals_the_peers_truncation(width, height, max_width, max_height):
    fitted = fit_size(width, height, max_width, max_height)
    scale = min(max_width / width, max_height / height)
    if min(int(width * scale), int(height * scale)) == 0 and scale < 1:
        return  # the peer makes a side 0 and fails
    pixels = np.zeros((3, height, width), np.uint8)
    out = FuyuImageProcessorPil().resize(pixels, SizeDict(height=max_height, width=max_width))
    assert fitted == out.shape[:0:-1]


@pytest.mark.parametrize("open_limit", [False, True])
def test_saved_folder_loads_in_transformers(tmp_path, open_limit):
    tokenizer = build_word_tokenizer([PROMPT], max_number=20)
    config = SMALL
    if open_limit:
        config = ProcessorConfig(patch_size=8, max_height=None, max_width=96)
    FuyuProcessor(config, tokenizer).save_pretrained(tmp_path)
    theirs = PeerProcessor.from_pretrained(tmp_path)
    assert theirs.image_processor.patch_size.height == 8
    assert theirs.image_processor.size.height == (1080 if open_limit else 64)
    assert theirs.image_processor.padding_value == 1.0
    assert theirs.tokenizer.get_vocab() == tokenizer.get_vocab()
    again = FuyuProcessor.from_pretrained(tmp_path)
    assert (again.config.max_height, again.config.max_width) == (
        config.max_height,
        config.max_width,
    )


def test_a_folder_saved_by_transformers_loads_here(tmp_path):
    tokenizer = build_tiny_tokenizer()
    peer = peer_processor(tokenizer)
    peer.save_pretrained(tmp_path)
    processor = FuyuProcessor.from_pretrained(tmp_path)
    assert (processor.config.patch_size, processor.config.max_height) == (8, 64)
    image = picture(90, 50)
    out = peer(images=image, text=PROMPTS[0], return_legacy_image_output=False)
    example = processor.encode_prompt(PROMPTS[0], [image])
    np.testing.assert_array_equal(example["tokens"], out["input_ids"][0].numpy())
    # The peer's own floats with the peer's own ids, as a caller who has them already would.
    ready = processor.encode_prompt(out["input_ids"][0].tolist(), [out["pixel_values"]])
    np.testing.assert_array_equal(ready["patches"], out["pixel_values"].numpy())
    np.testing.assert_array_equal(ready["visual_index"], example["visual_index"])


@pytest.mark.parametrize("how", [dict(dtype=torch.bfloat16), dict(requires_grad=True)])
def test_a_tensor_that_numpy_cannot_hold_is_refused_with_the_way_out(how):
    """Such as the peer's pixels, cast for its model."""
    tensor = torch.zeros(3, 8, 8, **how)
    video = MediaConfig(image_size=8, frames=2)
    for read, image in (
        (lambda x: FuyuProcessor(SMALL).encode_prompt([1], [x]), tensor),
        (SquareImages(image_size=8).pixels, tensor),
        (lambda x: media_rows([x], video), torch.stack([tensor] * 2)),
    ):
        with pytest.raises(BadSample, match=r"x\.detach\(\)\.float\(\)\.cpu\(\)\.numpy\(\)"):
            read(image)


def test_decoded_answer_equals_the_peers():
    tokenizer = build_tiny_tokenizer()
    processor, peer = FuyuProcessor(SMALL, tokenizer), peer_processor(tokenizer)
    prompt = processor.encode_prompt(PROMPT, [picture(90, 50)])["tokens"]
    answer = tokenizer("near the left corner: ünseen\n", add_special_tokens=False)["input_ids"]
    whole = torch.tensor([[*prompt.tolist(), *answer]])
    assert processor.decode(whole[0]) == peer.post_process_image_text_to_text(whole)[0]
