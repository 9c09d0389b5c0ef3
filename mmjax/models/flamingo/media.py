"""Media: pictures and videos to rows of grey levels, and which of them each token looks at."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mmjax.data.images import to_numpy
from mmjax.models.flamingo.processor_config import ProcessorConfig
from mmjax.types import BadSample, ImageSource


def media_rows(sources: list[ImageSource], config: ProcessorConfig) -> np.ndarray:
    """Read media into [m, frames*image_size*image_size*3]: frames, rows, columns, channels.

    uint8 grey levels; float32 where one of them came normalised, then all are. Raises BadSample:
    frame_count, bad_image_type, and those of ``open_image``.
    """
    rows = [_medium(source, i, config) for i, source in enumerate(sources)]
    if not rows:
        return np.zeros((0, config.patch_dim), np.uint8)
    return np.stack(config.alike(rows)).reshape(len(rows), config.patch_dim)


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
    return np.stack(config.alike([config.pixels(frame) for frame in frames]))


def _frames(source: ImageSource) -> list[Any]:
    """Take a video apart: a list of pictures, or an array with a frames axis."""
    if isinstance(source, list | tuple):
        return list(source)
    if getattr(source, "ndim", 0) < 4:
        return [source]
    array = to_numpy(source)
    while array.ndim > 4 and len(array) == 1:  # the peer's axes for batch and media
        array = array[0]
    return list(array)
