"""Dynamic resolution: reduce images to a side drawn for each sample, or to a fixed one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mmjax.types import MMJaxError, Record


def at_resolution(record: Record, longest: int | None) -> Record:
    """Reduce every image of a record so that its longest side is ``longest``; never enlarge.

    Aspect is kept; Pillow's antialiased bilinear filter. None leaves the record as it is. Raises
    BadSample where an image cannot be read.
    """
    if longest is None or not record.images:
        return record
    from mmjax.data import images as im

    reduced = []
    for source in record.images:
        if isinstance(source, np.ndarray) and max(source.shape) <= longest:
            reduced.append(source)
            continue
        image = im.open_image(source)
        if max(image.size) <= longest:
            reduced.append(source)
            continue
        width, height = im.fit_size(*image.size, longest, longest)
        image = im.to_rgb(image, im.source_name(source))
        reduced.append(np.asarray(im.resize(image, max(width, 1), max(height, 1))))
    return dataclasses.replace(record, images=tuple(reduced))


def draw_resolution(
    resolutions: Sequence[int | None] | None, rng: np.random.Generator
) -> int | None:
    """Draw a longest side; repeat a value to make it likelier, None keeps the size."""
    if not resolutions:
        return None
    return resolutions[int(rng.integers(len(resolutions)))]


def check_resolutions(resolutions: Sequence[int | None] | None) -> None:
    """Raise MMJaxError unless every resolution is a positive number of pixels or None."""
    for side in resolutions or ():
        if side is not None and (not isinstance(side, int) or side < 1):
            raise MMJaxError(f"resolutions {resolutions}: {side!r} is not a number of pixels")
