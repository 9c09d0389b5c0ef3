"""Settings of Flamingo's processor that cannot be followed are refused, by name."""

import json

import pytest

from mmjax.models.bunny.processor import ProcessorConfig as BunnyConfig
from mmjax.models.flamingo.processor import ProcessorConfig
from mmjax.types import MMJaxError


@pytest.mark.parametrize(
    "data, says",
    [
        ({"do_resize": False}, "do_resize = false"),
        ({"do_normalize": False}, "do_normalize = false"),
        ({"rescale_factor": 1.0}, "only 1/255"),
        ({"size": {"height": 8, "width": 9}}, "square"),
        ({"size": {"shortest_edge": 8}, "do_center_crop": False}, "would not be square"),
        ({"size": {"shortest_edge": 8}, "crop_size": 9}, "shortest_edge = 8 is less than the 9"),
        ({"size": {"height": 8, "width": 8}, "crop_size": 6}, "a squashed picture is not cropped"),
        # The peer shortens the longer side to 16 then: another picture, not another word.
        ({"size": {"shortest_edge": 8, "longest_edge": 16}}, "longest_edge.*cannot be followed"),
        ({"size": {"max_height": 8, "max_width": 8}}, "it takes shortest_edge or height and width"),
        ({"size": "8"}, "image_size is '8'"),
        ({"image_processor": [8]}, "image_processor = .*expected an object"),
        ({"mmjax": [8]}, "mmjax = .*expected an object"),
        ({"rescale_factor": [1]}, "only 1/255"),
        ({"resample": "bicubic"}, "resample is 'bicubic'; give one of Pillow's filters: 0 nearest"),
        ({"resample": 6}, "resample is 6"),
        ({"image_mean": [0.5, 0.5]}, "give a number, or 3: one a channel"),
        ({"image_std": {"r": 1}}, "image_std is .*give a number"),
        ({"image_std": [0.5, 0, 0.5]}, "what divides pixels cannot be 0"),
    ],
)
def test_files_that_cannot_be_followed(data, says):
    with pytest.raises(MMJaxError, match=says):
        ProcessorConfig.from_hf(data)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"fit": "stretch"}, "fit is 'stretch'; one of crop, crop_down, squash"),
        ({"attend_mode": "last"}, "attend_mode is 'last'; one of previous, next, random"),
        ({"frames": 0}, "frames is 0"),
        ({"image_size": 2.5}, "image_size is 2.5"),
        ({"image_mark": ""}, "image_mark is empty"),
        ({"max_pixels": 0}, "max_pixels is 0; give a number from 1 up"),
    ],
)
def test_options_that_no_pipeline_has(options, says):
    with pytest.raises(MMJaxError, match=says):
        ProcessorConfig(**options)


def test_a_models_embeddings_of_media_limit_a_sample(tmp_path):
    says = dict(model_type="flamingo", perceiver_config=dict(max_media=3))
    (tmp_path / "config.json").write_text(json.dumps(says))
    assert ProcessorConfig.from_folder(tmp_path).max_media == 3
    (tmp_path / "config.json").write_text(json.dumps(dict(says, perceiver_config=None)))
    assert ProcessorConfig.from_folder(tmp_path).max_media is None


def test_null_in_a_file_says_nothing():
    """transformers writes it for what an image processor does not have, such as SigLIP's crop."""
    said = {"size": {"height": 8, "width": 8}, "do_center_crop": None, "crop_size": None}
    none = dict.fromkeys(("image_mean", "image_std", "resample", "rescale_factor", "mmjax"))
    want = ProcessorConfig(image_size=8, fit="squash")
    assert ProcessorConfig.from_hf(said | none | {"image_processor": None}) == want
    assert ProcessorConfig.from_hf({"image_processor": said | none}) == want
    assert ProcessorConfig.from_hf(said | {"crop_size": 6}).image_size == 8  # not cropped
    assert ProcessorConfig.from_hf(said | {"do_center_crop": True}) == want
    one = ProcessorConfig.from_hf(said | {"image_mean": 0.5, "image_std": 0.5})  # for all channels
    assert one.image_mean == one.image_std == (0.5, 0.5, 0.5)


def test_what_a_files_format_has_no_word_for_is_kept():
    config = ProcessorConfig(
        image_size=8, shortest_edge=9, frames=4, attend_mode="random", bos=True, image_mark="<i>"
    )
    assert ProcessorConfig.from_hf(config.to_hf()) == config
    squashed = ProcessorConfig(image_size=8, fit="squash", answer_token=True)
    assert ProcessorConfig.from_hf(squashed.to_hf()) == squashed
    for kind in (ProcessorConfig, BunnyConfig):  # else an export would see turned pictures again
        turned = kind(transpose=True, max_pixels=None)
        assert kind.from_hf(json.loads(json.dumps(turned.to_hf()))) == turned
        assert kind.from_hf(kind(max_pixels=9).to_hf()).max_pixels == 9


@pytest.mark.parametrize(
    "says, answer",
    [
        (dict(model_type="otter"), True),
        (dict(model_type="flamingo", architectures=["OtterModel"]), True),
        (dict(model_type="flamingo", answer_token_id=7), True),
        (dict(model_type="flamingo", architectures=["FlamingoForConditionalGeneration"]), False),
        (dict(model_type="flamingo", answer_token_id=None), False),
    ],
)
def test_a_model_with_the_answers_token_asks_for_it(tmp_path, says, answer):
    (tmp_path / "config.json").write_text(json.dumps(says))
    found = ProcessorConfig.from_folder(tmp_path)
    assert (found.answer_token, found.fit) == (answer, "crop_down" if answer else "crop")
    ProcessorConfig(fit="squash").save(tmp_path)  # what a file says counts
    assert ProcessorConfig.from_folder(tmp_path).fit == "squash"
