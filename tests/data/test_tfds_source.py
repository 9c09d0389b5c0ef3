"""Questions and answers of a TFDS dataset, without TensorFlow."""

import io
import os
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

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
    np.testing.assert_array_equal(record.images[0], pictures[2])
    first, (outline,) = source.outlines(found[2][1])
    assert first == found[2][1] and outline.images == (examples[2]["image"],)  # not decoded
    assert (outline.messages, outline.meta) == (record.messages, record.meta)
    unanswered = source[found[0][1]]
    assert len(unanswered.messages) == 1 and "answers" not in unanswered.meta
    first = TfdsSource(str(tmp_path), "train", {"question": "question", "answer": "answers.0"})
    assert first[found[2][1]].meta["answers"] == ["a2"]
    with pytest.raises(MMJaxError, match=r"no feature 'text' or 'answer'.*answers: seq.*question"):
        TfdsSource(str(tmp_path), "train", {"question": "text", "answer": "answer"})
    with pytest.raises(MMJaxError, match="split 'dev'"):
        TfdsSource(str(tmp_path), "dev")
