"""Reading, fitting and cutting images."""

import io
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax.data import images
from mmjax.data.images import (
    center_crop,
    fit_size,
    load_rgb,
    open_image,
    pad_to_multiple,
    pad_to_square,
    patchify,
    resize,
    resize_shortest,
)
from mmjax.types import BadSample


def picture(height=10, width=14, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image, file_format="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, file_format, **options)
    return stream.getvalue()


def refused(reason, source, **options):
    with pytest.raises(BadSample) as caught:
        load_rgb(source, **options)
    assert caught.value.reason == reason
    return str(caught.value)


def test_every_source_gives_the_same_pixels(tmp_path):
    pixels = picture()
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels))
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes())]
    sources += [Image.open(path), pixels, pixels.transpose(2, 0, 1)]
    for source in sources:
        np.testing.assert_array_equal(load_rgb(source), pixels)


def test_grey_and_alpha_become_rgb():
    pixels = picture()
    grey = np.repeat(pixels[..., :1], 3, -1)
    np.testing.assert_array_equal(load_rgb(pixels[..., 0]), grey)
    np.testing.assert_array_equal(load_rgb(pixels[..., :1]), grey)
    alpha = np.concatenate([pixels, np.full((10, 14, 1), 7, np.uint8)], -1)
    np.testing.assert_array_equal(load_rgb(encoded(alpha)), pixels)  # dropped, not blended


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "RGBA", "PA"])
def test_modes_give_three_channels_the_same_each_time(mode):
    image = Image.fromarray(picture()).convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    first, second = load_rgb(image), load_rgb(image.copy())
    assert first.shape == (10, 14, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, np.asarray(image.convert("RGB")))


def test_what_is_no_image_is_named_shortly():
    frames = (picture(3, 4), picture(5, 4))  # a video, for a model that takes pictures
    assert "<tuple of 2>: an image is a path" in refused("bad_image_type", frames)
    told = refused("missing_image", "data:image/png;base64," + "A" * 5000)
    assert len(told) < 400 and "AAA... (5022 long): no such image file" in told


def test_threads_leave_the_warnings_of_others_alone():
    before, data = list(warnings.filters), encoded(picture(120, 90))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: load_rgb(data), range(300)))
    assert warnings.filters == before


def test_pillow_says_nothing_of_what_is_checked_here():
    code = (
        "import io, warnings\nfrom PIL import Image\nfrom mmjax.data.images import open_image\n"
        "stream = io.BytesIO()\nImage.new('1', (10_000, 9_000)).save(stream, 'PNG')\n"
        "assert open_image(stream.getvalue(), max_pixels=None).size == (10_000, 9_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_transparent_palette_keeps_its_colours():
    image = Image.fromarray(picture()).convert("P")
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=b"\x00\x80")
    np.testing.assert_array_equal(load_rgb(stream.getvalue()), np.asarray(image.convert("RGB")))


def test_sixteen_bits_keep_the_high_byte():
    deep = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    want = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_array_equal(load_rgb(encoded(deep)), want)
    np.testing.assert_array_equal(load_rgb(Image.fromarray(deep.astype(np.int32))), want)
    floats = Image.fromarray(np.float32([[-3, 0.6, 254.4, 900, np.nan]]))
    np.testing.assert_array_equal(load_rgb(floats)[0, :, 0], [0, 1, 254, 255, 0])


def test_orientation_is_applied_only_when_asked():
    pixels = picture(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    data = encoded(pixels, exif=exif)
    np.testing.assert_array_equal(load_rgb(data), pixels)
    np.testing.assert_array_equal(load_rgb(data, transpose=True), np.rot90(pixels, -1))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_files_are_bad_samples_naming_the_file(tmp_path, file_format):
    data = encoded(picture(64, 64), file_format)
    path = tmp_path / f"cut.{file_format.lower()}"
    for keep in (0, 10, len(data) // 2):
        path.write_bytes(data[:keep])
        assert path.name in refused("corrupt_image", path)


def test_flipped_bytes_never_escape_as_another_error():
    data = encoded(picture(32, 32))
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(8, len(data), 6):
            broken[at] = rng.integers(256)
        try:
            assert load_rgb(bytes(broken)).ndim == 3
        except BadSample as error:
            assert error.reason in {"corrupt_image", "image_too_large"}


def test_missing_and_wrong_things(tmp_path):
    assert "nowhere.png" in refused("missing_image", tmp_path / "nowhere.png")
    refused("missing_image", tmp_path)
    refused("missing_image", "https://example.com/a.png")
    says = "<16 bytes>: cannot be read as an image (it is empty, cut off, or of no known format)"
    assert refused("corrupt_image", b"not an image at ").startswith(says)
    refused("bad_image_type", np.zeros((4, 4, 3), np.int64))
    refused("bad_image_type", np.zeros((5, 6, 7), np.uint8))
    refused("bad_image_type", object())
    refused("corrupt_image", np.zeros((0, 4, 3), np.uint8))


def test_bombs_are_refused_from_the_header(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 12000)).save(path)  # 240 megapixels in a few kilobytes
    assert os.path.getsize(path) < 100_000
    assert "bomb.png" in refused("image_too_large", path)
    assert "140" in refused("image_too_large", encoded(picture()), max_pixels=139)
    assert load_rgb(picture(), max_pixels=140).shape == (10, 14, 3)
    cut = encoded(picture(100, 100))[:60]  # the header is whole, the pixels are not there
    refused("image_too_large", cut, max_pixels=9999)
    assert open_image(cut, max_pixels=10000).size == (100, 100)


@pytest.mark.parametrize(
    ("size", "box", "fitted"),
    [
        ((1920, 1080), (1920, 1080), (1920, 1080)),
        ((1440, 1440), (1920, 1080), (1080, 1080)),
        ((2466, 1766), (1920, 1080), (1508, 1080)),
        ((300, 200), (1920, 1080), (300, 200)),  # never enlarged
        ((5000, 1), (100, 100), (100, 1)),  # the peer would make it 0 high
        ((4000, 3000), (None, None), (4000, 3000)),
        ((4000, 3000), (None, 1500), (2000, 1500)),
    ],
)
def test_fit_size(size, box, fitted):
    assert fit_size(*size, *box) == fitted


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((60, 40), (31, 17)),
        ((60, 40), (60, 40)),
        ((1201, 811), (777, 524)),
        ((801, 903), (98, 7)),
        ((801, 903), (99, 7)),
    ],
)
@pytest.mark.parametrize("cores", [1, 2, 8])
def test_resize_is_pillows_bilinear_whatever_the_threads(monkeypatch, source, target, cores):
    monkeypatch.setattr(images, "_CORES", cores)
    image = Image.fromarray(picture(source[1], source[0]))
    want = np.asarray(
        image.resize((target[0], source[1]), 2).resize(target, Image.Resampling.BILINEAR)
    )
    np.testing.assert_array_equal(resize(image, *target), want)


def test_patch_order_is_rows_columns_channels():
    # The value at channel c, row y, column x is c*3600 + y*60 + x.
    pixels = np.arange(3 * 60 * 60).reshape(3, 60, 60).transpose(1, 2, 0)
    patches = patchify(pixels, 30)
    assert patches.shape == (4, 2700)
    np.testing.assert_array_equal(patches[0, :7], [0, 3600, 7200, 1, 3601, 7201, 2])
    np.testing.assert_array_equal(patches[:, 0], [0, 30, 1800, 1830])
    with pytest.raises(ValueError, match="61x60"):
        patchify(np.zeros((61, 60, 3)), 30)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 3]))
def test_patches_stand_row_by_row(rows, cols, patch, channels):
    pixels = picture(rows * patch, cols * patch, channels)
    patches = patchify(pixels, patch)
    assert patches.shape == (rows * cols, patch * patch * channels)
    for place, got in enumerate(patches):
        y, x = (patch * i for i in divmod(place, cols))
        block = pixels[y : y + patch, x : x + patch]
        np.testing.assert_array_equal(got, block.reshape(-1))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
def test_padding_is_at_the_bottom_and_right(height, width, multiple):
    pixels = picture(height, width)
    padded = pad_to_multiple(pixels, multiple, 1.0)
    assert padded.dtype == np.uint8
    assert all(side % multiple == 0 for side in padded.shape[:2])
    assert padded.shape[0] - height < multiple and padded.shape[1] - width < multiple
    np.testing.assert_array_equal(padded[:height, :width], pixels)
    assert (padded[height:] == 1).all() and (padded[:, width:] == 1).all()


@pytest.mark.parametrize(
    "size, want", [((640, 427), (32, 22)), ((333, 500), (22, 33)), ((22, 90), (22, 90))]
)
def test_the_shortest_side_is_met_and_the_other_truncated(size, want):
    image = Image.fromarray(picture(size[1], size[0]))
    assert resize_shortest(image, 22).size == want  # 22 * 640 / 427 = 32.97
    with pytest.raises(BadSample, match="1x3000 .* above the limit") as caught:
        resize_shortest(Image.new("RGB", (1, 3000)), 224)
    assert caught.value.reason == "image_too_large"


@pytest.mark.parametrize(
    "rest, half, lower", [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (5, 2, 2)]
)
def test_an_odd_rest_is_cut_off_as_either_peer_does(rest, half, lower):
    pixels = picture(8, 8 + rest)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(center_crop(image, 8), pixels[:, half : half + 8])
    np.testing.assert_array_equal(
        center_crop(image, 8, round_down=True), pixels[:, lower : lower + 8]
    )


def test_a_square_has_the_image_in_its_middle():
    pixels = picture(6, 9)
    square = np.asarray(pad_to_square(Image.fromarray(pixels), (1, 2, 3)))
    np.testing.assert_array_equal(square[1:7], pixels)  # one row above, two below
    assert (square[[0, 7, 8]] == [1, 2, 3]).all() and square.shape == (9, 9, 3)
    tall = np.asarray(pad_to_square(Image.fromarray(pixels.transpose(1, 0, 2)), (1, 2, 3)))
    np.testing.assert_array_equal(tall, square.transpose(1, 0, 2))
    image = Image.fromarray(pixels[:6, :6])
    assert pad_to_square(image, (0, 0, 0)) is image
