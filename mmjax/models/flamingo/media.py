"""Media: pictures and videos to rows of grey levels, and which of them each token looks at."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mmjax.data.images import (
    center_crop,
    open_image,
    resize_shortest,
    source_name,
    to_rgb,
)
from mmjax.models.flamingo.processor_config import ProcessorConfig
from mmjax.types import BadSample, ImageSource


def media_rows(sources: list[ImageSource], config: ProcessorConfig) -> np.ndarray:
    """Read media into [m, frames*image_size*image_size*3]: frames, rows, columns, channels.

    uint8 grey levels; float32 where one of them came normalised, then all are. Raises BadSample:
    frame_count, bad_image_type, and those of ``open_image``.
    """
    rows = [_medium(source, i, config) for i, source in enumerate(sources)]
    if any(row.dtype != np.uint8 for row in rows):
        rows = [config.normalise(row) if row.dtype == np.uint8 else row for row in rows]
    if not rows:
        return np.zeros((0, config.patch_dim), np.uint8)
    return np.stack(rows).reshape(len(rows), config.patch_dim)


def look_at(media: np.ndarray, mode: Literal["previous", "next"]) -> np.ndarray:
    """Return the medium that each token may look at, int32[t]; -1 for none.

    media: bool[t], where ``<image>`` stands. ``previous``: text looks at the last medium before it.
    ``next``: text looks at the first one behind it, and text behind the last one at none. An
    ``<image>`` looks at its own. As MaskedCrossAttention of open_flamingo/src/helpers.py; of 0.1.1
    with attend_previous=False.
    """
    seen = np.cumsum(media, dtype=np.int32)
    if mode == "previous":
        return seen - np.int32(1)
    behind = np.where(seen < media.sum(), seen, np.int32(-1))
    return np.where(media, seen - np.int32(1), behind)


def _medium(source: ImageSource, index: int, config: ProcessorConfig) -> np.ndarray:
    """Read one medium: uint8 or float32 [frames, image_size, image_size, 3]."""
    frames = _frames(source)
    if len(frames) != config.frames:
        wanted = "one picture" if config.frames == 1 else f"a list of {config.frames} pictures"
        raise BadSample(
            "frame_count",
            f"image {index} holds {len(frames)} frames and the model takes {config.frames}; give "
            f"{wanted} for each <image>, or set the processor's option frames",
        )
    pixels = [_picture(frame, config) for frame in frames]
    if len({p.dtype for p in pixels}) > 1:
        pixels = [config.normalise(p) if p.dtype == np.uint8 else p for p in pixels]
    return np.stack(pixels)


def _frames(source: ImageSource) -> list[Any]:
    """Take a video apart: a list of pictures, or an array with a frames axis."""
    if isinstance(source, list | tuple):
        return list(source)
    if getattr(source, "ndim", 0) < 4:
        return [source]
    array = np.asarray(source)
    while array.ndim > 4 and len(array) == 1:  # the peer's axes for batch and media
        array = array[0]
    return list(array)


def _picture(source: ImageSource, config: ProcessorConfig) -> np.ndarray:
    """Bring one picture to [image_size, image_size, 3]."""
    side = config.image_size
    if hasattr(source, "__array__") and getattr(source, "ndim", 0):
        array = np.asarray(source)
        if np.issubdtype(array.dtype, np.floating):
            return _normalised(array, source_name(source), side)
        source = array
    name = source_name(source)
    image = open_image(source, max_pixels=config.max_pixels, transpose=config.transpose)
    image = to_rgb(image, name)
    if config.fit == "squash":
        return np.asarray(image.resize((side, side), config.resample))
    image = resize_shortest(image, config.shortest_edge or side, config.resample)
    return center_crop(image, side, round_down=config.fit == "crop_down")


def _normalised(array: np.ndarray, name: str, side: int) -> np.ndarray:
    """Take ready pixels with the channels on either side."""
    if array.shape == (3, side, side):
        array = array.transpose(1, 2, 0)
    if array.shape != (side, side, 3):
        raise BadSample(
            "bad_image_type",
            f"{name}: float images are normalised pixels [{side},{side},3] or [3,{side},{side}], "
            f"with frames in front for a video; got {list(array.shape)}",
        )
    return array.astype(np.float32)
