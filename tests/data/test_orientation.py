"""EXIF orientation: ignored as the peers do, or applied, whatever was done to a picture before."""

import io

import numpy as np
import pytest
from PIL import Image

from mmjax.data.augment import flip_at_random
from mmjax.data.images import load_rgb, resize
from mmjax.data.resizing import at_resolution, pad_at_random, squash_first
from mmjax.types import Message, Record

TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}
STORED = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def stored(exif):
    stream = io.BytesIO()
    Image.fromarray(STORED).save(stream, "PNG", exif=exif)
    return Record((Message("user", "q"),), (stream.getvalue(),))


@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_that_was_changed_is_turned_like_one_that_was_not(orientation):
    turn, exif = TURNS[orientation], Image.Exif()
    exif[0x0112] = orientation
    record = stored(exif)

    def same(one, raw, turned=None):
        (image,) = one.images
        np.testing.assert_array_equal(load_rgb(image), raw)
        upright = turn(raw) if turned is None else turned
        np.testing.assert_array_equal(load_rgb(image, transpose=True), upright)

    same(record, STORED)
    small, pixels = at_resolution(record, 10), resize(Image.fromarray(STORED), 10, 6)
    same(small, pixels)
    mirrored = flip_at_random(small, np.random.default_rng(0), share=1)
    same(mirrored, pixels[:, ::-1], turn(pixels)[:, ::-1])
    squared = pad_at_random(small, np.random.default_rng(0), share=1)
    raw = load_rgb(squared.images[0])
    np.testing.assert_array_equal(raw[2:8], pixels)
    same(squared, raw)
    squashed = squash_first(record, 8)
    same(squashed, load_rgb(squashed.images[0]))


def test_a_picture_without_orientation_becomes_an_array_even_if_its_exif_is_broken():
    for exif in (Image.Exif(), b"Exif\0\0 and no more"):
        (image,) = squash_first(stored(exif), 8).images
        assert isinstance(image, np.ndarray) and image.shape == (8, 8, 3)
