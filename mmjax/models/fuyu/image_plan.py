"""How one image will stand in Fuyu's stream, decided from its header; and its patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data.images import (
    fit_size,
    open_image,
    pad_to_multiple,
    patchify,
    resize,
    scale_of,
    source_name,
    to_numpy,
    to_rgb,
)
from mmjax.models.fuyu.processor_config import ProcessorConfig
from mmjax.types import BadSample, ImageSource


@dataclasses.dataclass(frozen=True)
class ImagePlan:
    """One image before its pixels are read: its size in the stream, and where they come from.

    size: (width, height) of the source; fitted: after shrinking; rows, cols: the patch grid, cols 0
    for patches that came without a grid. pixels: the opened image, or float [h,w,3] or [p,pixels].
    reduced: by what the source was resized already, as ``scale_of`` tells.
    """

    name: str
    size: tuple[int, int]
    fitted: tuple[int, int]
    rows: int
    cols: int
    pixels: Any
    reduced: float = 1.0

    @property
    def num_patches(self) -> int:
        """Rows of the visual stream."""
        return self.rows * self.cols if self.cols else self.rows

    @property
    def num_tokens(self) -> int:
        """Tokens of the text stream: the patches and one newline for each row."""
        return self.rows * (self.cols + 1)

    @property
    def scale(self) -> float:
        """Height in the stream over the picture's own, the peers' one factor for both axes."""
        return self.reduced * self.fitted[1] / self.size[1] if self.size[1] else 1.0


def plan_image(source: ImageSource, config: ProcessorConfig) -> ImagePlan:
    """Look at one image without decoding it.

    Raises BadSample as ``open_image`` does, and bad_image_type for floats of another shape.
    """
    floats = _float_array(source)
    if floats is not None:
        return _plan_floats(floats, source_name(source), config)
    image = open_image(source, max_pixels=config.max_pixels, transpose=config.transpose)
    fitted = fitted_size(*image.size, config)
    rows, cols = grid(*fitted, config.patch_size)
    name, reduced = source_name(source), scale_of(image)
    return ImagePlan(name, image.size, fitted, rows, cols, image, reduced)


def cut_patches(plan: ImagePlan, config: ProcessorConfig) -> np.ndarray:
    """Make the patches [p, pixels] of one image: uint8, or float32 where it came normalised."""
    if not plan.cols:
        return plan.pixels
    if isinstance(plan.pixels, Image.Image):
        pixels = resize(to_rgb(plan.pixels, plan.name), *plan.fitted, config.resample)
        fill = config.padding_value
    else:
        pixels = plan.pixels
        fill = config.normalise(np.asarray(config.padding_value))
    return patchify(pad_to_multiple(pixels, config.patch_size, fill), config.patch_size)


def grid(width: int, height: int, patch: int) -> tuple[int, int]:
    """Count (rows, columns) of patches that cover a size as it stands."""
    return -(-height // patch), -(-width // patch)


def fitted_size(width: int, height: int, config: ProcessorConfig) -> tuple[int, int]:
    """Return the (width, height) an image is shrunk to: the box, then max_image_tokens."""
    fitted = fit_size(width, height, config.max_width, config.max_height)
    if config.max_image_tokens is None:
        return fitted
    return largest_within(*fitted, config.patch_size, config.max_image_tokens)


def largest_within(width: int, height: int, patch: int, tokens: int) -> tuple[int, int] | None:
    """Find the largest size of this aspect whose image makes at most so many tokens, or None."""

    def at(scale: float) -> tuple[int, int]:
        return max(1, int(width * scale)), max(1, int(height * scale))

    def fits(size: tuple[int, int]) -> bool:
        rows, cols = grid(*size, patch)
        return rows * (cols + 1) <= tokens

    if fits((width, height)):
        return width, height
    low, high = 0.0, 1.0
    if not fits(at(low)):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


def too_long(plans: Sequence[ImagePlan], total: int, limit: int, patch: int) -> str:
    """Say what makes so many tokens, above the limit, and which size of the image would fit."""
    message = f"the sample makes {total} tokens, above max_tokens = {limit} (data.seq_len of a run)"
    if not plans:
        return f"{message}; shorten the text or raise max_tokens"
    plan = max(plans, key=lambda p: p.num_tokens)
    rest = total - plan.num_tokens
    width, height = plan.size
    message += f": {plan.name} of {width}x{height} makes {plan.num_tokens} of them"
    if plan.fitted != plan.size:
        message += f" (already shrunk to {plan.fitted[0]}x{plan.fitted[1]})"
    best = largest_within(*plan.fitted, patch, limit - rest)
    if best is None:
        return f"{message}, and the other {rest} leave it no room; raise max_tokens"
    return (
        f"{message}; the largest size of it that fits is {best[0]}x{best[1]}: lower the "
        "resolution, or max_height and max_width, or raise max_tokens"
    )


def _plan_floats(array: np.ndarray, name: str, config: ProcessorConfig) -> ImagePlan:
    """Recognise ready patches [p,pixels] or normalised pixels [3,h,w], [h,w,3]."""
    channels, shape = config.num_channels, array.shape
    ready = array.ndim == 3 and shape[2] == config.patch_dim
    if (ready or array.ndim == 4) and shape[0] == 1:
        array = array[0]
    if array.ndim == 2 and array.shape[1] == config.patch_dim:
        return ImagePlan(name, (0, 0), (0, 0), len(array), 0, array)
    if array.ndim == 3 and array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise BadSample(
            "bad_image_type",
            f"{name}: float images are patches [p,{config.patch_dim}] or normalised "
            f"pixels [{channels},h,w], each with or without a leading 1; got {list(shape)}",
        )
    size = (array.shape[1], array.shape[0])
    return ImagePlan(name, size, size, *grid(*size, config.patch_size), array)


def _float_array(source: ImageSource) -> np.ndarray | None:
    """Return float pixels or patches as float32; None for every other kind of image."""
    if isinstance(source, Image.Image) or not hasattr(source, "__array__"):
        return None
    array = to_numpy(source)
    return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else None
