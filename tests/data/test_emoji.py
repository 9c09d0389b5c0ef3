"""Emoji: the right drawing with the right name, variants by their draw, files that are whole."""

import base64
import hashlib
import io
import tarfile

import numpy as np
import pytest

from mmjax.data import emoji
from mmjax.types import MMJaxError
from tests.data import emoji_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return emoji_files.write(tmp_path_factory.mktemp("emoji"))


def test_a_record_is_the_drawing_and_its_name(folder):
    source = emoji.EmojiSource("twitter", folder=folder)
    assert len(source) == 3
    record = source[2]
    assert [m.text for m in record.messages] == ["<image>What is this?", "japan flag"]
    assert record.meta["answers"] == ["japan flag"] and record.meta["group"] == "Flags"
    (image,) = record.images
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert (image[4:28, 4:28] == (200, 200, 50)).all() and (image[:4] == 255).all()
    google = emoji.EmojiSource("google", folder=folder)[2].images[0]
    assert (google[16, 16] == (200, 0, 50)).all()


def test_categories_choose_and_variants_are_functions_of_their_place(folder):
    flags = emoji.EmojiSource("google", categories=("Flags",), variants=4, folder=folder)
    assert len(flags) == 8 and emoji.captions(["Flags"], folder) == ["chad flag", "japan flag"]
    assert {flags[i].meta["group"] for i in range(8)} == {"Flags"}
    drawn = [flags[i].images[0] for i in (0, 2, 4, 6)]
    assert len({image.tobytes() for image in drawn}) == 4
    np.testing.assert_array_equal(flags[4].images[0], drawn[2])


def test_mistakes_are_named(folder, tmp_path):
    for wrong, said in (
        (dict(style="apple"), "style 'apple'.*one of google, twitter"),
        (dict(style="google", categories=("Flag",)), "category 'Flag' is unknown"),
        (dict(style="google", variants=0), "variants is at least 1"),
    ):
        with pytest.raises(MMJaxError, match=said):
            emoji.EmojiSource(**wrong, folder=folder)
    with pytest.raises(MMJaxError, match="fetch it with `python -m mmjax.data.emoji`"):
        emoji.EmojiSource("google", folder=tmp_path)


def test_a_package_is_unpacked_whole_or_refused(folder, tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        (folder / "LICENSE").write_text("MIT")
        for name in emoji._MEMBERS:
            archive.add(folder / name, f"package/{name}")
    digest = base64.b64encode(hashlib.sha512(data.getvalue()).digest()).decode()
    emoji.unpack(data.getvalue(), tmp_path / "new", digest)
    np.testing.assert_array_equal(
        emoji.EmojiSource("google", folder=tmp_path / "new")[1].images[0],
        emoji.EmojiSource("google", folder=folder)[1].images[0],
    )
    with pytest.raises(MMJaxError, match="not emoji-datasource 16.0.0; fetch it again"):
        emoji.unpack(data.getvalue()[:-1], tmp_path / "cut", digest)
    assert not (tmp_path / "cut").exists()
