"""Questions and answers of a TFDS dataset, without TensorFlow."""

import io
import os
import pickle
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import ExifTags, Image

from mmjax.data.images import load_rgb
from mmjax.data.tfds_files import _as_stored
from mmjax.data.tfds_source import TfdsSource
from mmjax.types import MMJaxError


def write_tfds(folder, features, examples):
    """Write a tiny dataset; pictures go in encoded, for arrays TFDS would ask TensorFlow."""
    os.makedirs(folder, exist_ok=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="tiny", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
        ),
        features=features,
    )
    writer = tfds.core.SequentialWriter(info, 10, overwrite=True, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": examples})
    writer.close_all()
    return str(folder)


def test_tfds_is_read_from_array_record_without_tensorflow(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "question": tfds.features.Text(),
            "answers": tfds.features.Sequence(tfds.features.Text()),
        }
    )
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 4, 6, 3)).astype(np.uint8)
    examples = []
    for i, picture in enumerate(pictures):
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        answers = [f"a{i}", "b"] if i else []
        example = {"image": png.getvalue(), "question": f"q{i}", "answers": answers}
        examples.append(example)
    write_tfds(tmp_path, features, examples)
    source = TfdsSource(
        str(tmp_path), "train", {"image": "image", "question": "question", "answer": "answers"}
    )
    assert len(source) == 3
    source = pickle.loads(pickle.dumps(source))
    found = sorted((source[i].messages[0].text, i) for i in range(3))
    assert [q for q, _ in found] == ["q0", "q1", "q2"]
    record = source[found[2][1]]
    assert record.messages[1].text == "a2" and record.meta["answers"] == ["a2", "b"]
    np.testing.assert_array_equal(load_rgb(record.images[0]), pictures[2])
    unanswered = source[found[0][1]]
    assert len(unanswered.messages) == 1 and "answers" not in unanswered.meta
    first = TfdsSource(str(tmp_path), "train", {"question": "question", "answer": "answers.0"})
    assert first[found[2][1]].meta["answers"] == ["a2"]
    with pytest.raises(MMJaxError, match=r"no feature 'text' or 'answer'.*answers: seq.*question"):
        TfdsSource(str(tmp_path), "train", {"question": "text", "answer": "answer"})
    with pytest.raises(MMJaxError, match="split 'dev'"):
        TfdsSource(str(tmp_path), "dev")


def test_pictures_are_read_as_those_of_other_sources(tmp_path):
    """TFDS's own decoding knows no orientation, and makes other pixels of a see-through palette."""
    grey = np.random.default_rng(1).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = []
    for form, picture, more in (
        ("JPEG", Image.fromarray(grey), {"exif": exif}),
        ("PNG", Image.fromarray(grey).quantize(8), {"transparency": bytes(range(0, 240, 30))}),
        ("PNG", Image.fromarray(grey[..., 0].astype(np.uint16) * 257), {}),
    ):
        file = io.BytesIO()
        picture.save(file, form, **more)
        files.append(file.getvalue())
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "question": tfds.features.Text(),
        }
    )
    examples = [{"image": file, "question": str(i)} for i, file in enumerate(files)]
    write_tfds(tmp_path, features, examples)
    source = TfdsSource(str(tmp_path), "train", {"image": "image", "question": "question"})
    for i in range(3):
        record = source[i]
        assert record.images == (files[int(record.messages[0].text)],)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"image": "i"}, "fields {'image': 'i'} lack 'question'"),
        ({"question": "q", "anser": "a"}, "have 'anser'; did you mean 'answer'?"),
    ],
)
def test_fields_that_say_too_little_or_nothing_known_are_refused(fields, says):
    with pytest.raises(MMJaxError, match="TFDS 'vqa': .*" + re.escape(says)):
        TfdsSource("vqa", "train", fields)


def test_float_images_are_decoded_by_tfds():
    """Their file holds the bytes of a float as channels: it is no picture."""
    image = tfds.features.Image
    features = {"grey": image(shape=(2, 2, 3)), "depth": image(shape=(2, 2, 1), dtype=np.float32)}
    decoders = _as_stored(tfds.features.FeaturesDict(features), tfds)
    assert decoders["grey"].decode_example_np(b"file") == b"file" and decoders["depth"] is None
