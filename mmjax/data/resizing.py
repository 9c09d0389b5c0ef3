"""Dynamic resolution: images brought to a size drawn for each sample, or to a fixed one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data import images as im
from mmjax.data.templates import IMAGE_MARK
from mmjax.types import BadSample, ImageSource, MMJaxError, Record

Resolutions = Sequence[int | None] | Mapping[str, int]
"""Longest sides in pixels to draw from: a set, in which None keeps an image as it is and a value
given twice is twice as likely, or the range ``{"min": 224, "max": 1024, "multiple": 32}``, every
multiple of 32 (of 1 where it is left out) from 224 to 1024, each as likely as another."""


def at_resolution(
    record: Record,
    longest: int | None,
    *,
    enlarge: bool = False,
    max_pixels: int | None = im.MAX_PIXELS,
) -> Record:
    """Reduce every image of a record so that its longest side is ``longest``.

    Aspect is kept; Pillow's antialiased bilinear filter. None leaves the record as it is. Smaller
    images stay as they are, too, unless ``enlarge`` asks for them to be scaled up. max_pixels: as
    for ``open_image``. Raises BadSample as that does: a file of too many pixels is refused before
    it is decoded.
    """
    if longest is None or not record.images:
        return record
    resized = tuple(
        each_picture(source, lambda one: _resized(one, longest, enlarge, max_pixels))
        for source in record.images
    )
    return dataclasses.replace(record, images=resized)


def size_at(width: int, height: int, longest: int, *, enlarge: bool = False) -> tuple[int, int]:
    """Return the (width, height) with this longest side and the same aspect, in exact integers.

    The shorter side is rounded down, to 1 pixel at the least.
    """
    longer = max(width, height)
    if longer == longest or (longer < longest and not enlarge):
        return width, height
    return max(1, width * longest // longer), max(1, height * longest // longer)


def pixel_limit(processor: Any) -> int | None:
    """Return the pixels above which a processor's settings refuse a file, None for no limit."""
    return getattr(getattr(processor, "config", None), "max_pixels", im.MAX_PIXELS)


def squash_first(record: Record, side: int) -> Record:
    """Squash the first image of a record to side x side and leave out all others, as OtterHD did.

    Reproduces ``prepare_fuyu`` of Otter's pipeline/mimicit_utils/mimicit_dataset.py, for
    ``legacy_otter``: ``img[0].resize((side, side))``, where Pillow's default filter is bicubic,
    the aspect is lost, small images are enlarged and only the first one is looked at; a record
    without an image gets a black one. The peer draws one size for a batch of each process, here
    each sample has its own. Raises BadSample as ``open_image`` does.
    """
    if record.images:
        image = im.open_image(record.images[0])
        whole = im.to_rgb(image, im.source_name(record.images[0]))
        pixels = np.asarray(whole.resize((side, side), im.Image.Resampling.BICUBIC))
        pixels = im.with_origin(pixels, image)
    else:
        pixels = np.zeros((side, side, 3), np.uint8)
    messages = record.messages
    if sum(m.text.count(IMAGE_MARK) for m in messages) == len(record.images):
        # The marks go with the images: the one that is left opens the prompt.
        messages = tuple(dataclasses.replace(m, text=_without_marks(m.text)) for m in messages)
    return dataclasses.replace(record, messages=messages, images=(pixels,))


def pad_at_random(record: Record, rng: np.random.Generator, share: float = 0.5) -> Record:
    """Pad each image of a record to a square of a random colour, with probability ``share``.

    What instruct_flamingo does to its training images, so that a center crop does not always cut
    off what stands at the ends of a long picture. The frames of a video are padded alike.
    """
    images = []
    for source in record.images:
        padded, colour = rng.random() < share, tuple(rng.integers(0, 256, 3).tolist())
        images.append(
            each_picture(source, lambda one, c=colour: _padded(one, c)) if padded else source
        )
    return dataclasses.replace(record, images=tuple(images))


def draw_resolution(
    resolutions: Sequence[int | None] | None, rng: np.random.Generator
) -> int | None:
    """Draw a longest side from those of ``list_resolutions``; None keeps the size."""
    if not resolutions:
        return None
    return resolutions[int(rng.integers(len(resolutions)))]


def list_resolutions(resolutions: Resolutions | None) -> tuple[int | None, ...] | None:
    """Write out every longest side there is to draw from; None where nothing is drawn.

    Raises MMJaxError for what is not a number of pixels, and for a range that holds nothing.
    """
    if not resolutions:
        return None
    if isinstance(resolutions, Mapping):
        return _range(resolutions)
    for side in resolutions:
        if side is not None:
            _check_pixels(side, f"resolutions {tuple(resolutions)}: {side!r}")
    return tuple(resolutions)


def _range(given: Mapping[str, int]) -> tuple[int, ...]:
    """Write out a range of longest sides."""
    known = ("min", "max", "multiple")
    wrong = [k for k in given if k not in known] + [k for k in known[:2] if k not in given]
    if wrong:
        raise MMJaxError(
            f"resolutions {dict(given)}: a range has the keys min, max and, if wanted, multiple; "
            f"look at {', '.join(map(repr, wrong))}"
        )
    for key, value in given.items():
        _check_pixels(value, f"resolutions {dict(given)}: {key} = {value!r}")
    low, high, multiple = given["min"], given["max"], given.get("multiple", 1)
    sides = tuple(range(-(-low // multiple) * multiple, high + 1, multiple))
    if not sides:
        raise MMJaxError(
            f"resolutions {dict(given)}: no multiple of {multiple} lies from {low} to {high}; "
            "lower min or multiple, or raise max"
        )
    return sides


def _check_pixels(value: Any, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MMJaxError(f"{what} is not a number of pixels; give whole numbers from 1 up")


def each_picture(source: ImageSource, change: Callable[[ImageSource], ImageSource]) -> ImageSource:
    """Change one image, or every frame of a video."""
    if isinstance(source, list | tuple):
        return tuple(change(one) for one in source)
    return change(source)


def _padded(source: ImageSource, colour: tuple[int, int, int]) -> ImageSource:
    image = im.open_image(source)
    square = im.pad_to_square(im.to_rgb(image, im.source_name(source)), colour)
    return im.with_origin(np.asarray(square), image)


def _resized(
    source: ImageSource, longest: int, enlarge: bool, max_pixels: int | None
) -> ImageSource:
    """Bring one image to a longest side; the source itself where it has that size already."""
    if not enlarge and isinstance(source, np.ndarray) and max(source.shape) <= longest:
        return source
    image = im.open_image(source, max_pixels=max_pixels)
    size = size_at(*image.size, longest, enlarge=enlarge)
    if size == image.size:
        return source
    if size[0] * size[1] > im.MAX_PIXELS:
        raise BadSample(
            "image_too_large",
            f"{im.source_name(source)}: enlarged to {size[0]}x{size[1]} it would be above the "
            f"limit of {im.MAX_PIXELS} pixels; lower the resolution",
        )
    pixels = np.asarray(im.resize(im.to_rgb(image, im.source_name(source)), *size))
    return im.with_origin(pixels, image, scale=size[1] / image.height)


def _without_marks(text: str) -> str:
    """Take the image marks out of a turn, with the line ends that touch them."""
    parts = text.split(IMAGE_MARK)
    inner = [part.strip("\r\n") for part in parts[1:-1]]
    if len(parts) == 1:
        return text
    return "".join([parts[0].rstrip("\r\n"), *inner, parts[-1].lstrip("\r\n")])
