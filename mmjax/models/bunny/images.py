"""Pictures of any shape to rows of the visual stream: padded to a square or not, then resized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.images import pad_to_square
from mmjax.models.bunny.processor_config import ProcessorConfig
from mmjax.types import ImageSource


def image_rows(sources: Sequence[ImageSource], config: ProcessorConfig) -> np.ndarray:
    """Read images into [m, image_size*image_size*3]: rows, columns, channels.

    uint8 grey levels; float32 where one of them came normalised, then all are. Raises BadSample:
    bad_image_type, and those of ``open_image``.
    """
    if not sources:
        return np.zeros((0, config.patch_dim), np.uint8)
    prepare = None
    if config.image_aspect_ratio == "pad":
        colour = tuple(int(255 * mean) for mean in config.image_mean)

        def prepare(image: Any) -> Any:
            return pad_to_square(image, colour)

    pixels = [config.pixels(_one(source), prepare) for source in sources]
    return np.stack(config.alike(pixels)).reshape(len(pixels), config.patch_dim)


def _one(source: ImageSource) -> ImageSource:
    """Take an array out of the peer's axes for a batch and for the images of a sample."""
    while getattr(source, "ndim", 0) > 3 and len(source) == 1:
        source = source[0]
    return source
