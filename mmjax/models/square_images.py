"""Pictures as vision towers take them: brought to a square, and the file that says how.

What CLIP's and SigLIP's image processors do, with the settings that transformers writes into
``preprocessor_config.json``. numpy and Pillow only: processors are built on this.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from PIL import Image

from mmjax.data.images import (
    MAX_PIXELS,
    center_crop,
    open_image,
    resize_shortest,
    source_name,
    to_numpy,
    to_rgb,
)
from mmjax.models.image_settings import (
    OWN_KEY,
    check_colours,
    check_filter,
    check_keys,
    check_rescaled,
    merged,
    own_settings,
)
from mmjax.models.json_files import read_json
from mmjax.models.normalisation import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD
from mmjax.types import BadSample, ImageSource, MMJaxError, is_count

Fit = Literal["crop", "crop_down", "squash"]

_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclasses.dataclass(frozen=True)
class SquareImages:
    """How a picture becomes the square that a vision tower takes.

    image_size: side of the square in pixels; shortest_edge: what the shortest side is resized to
    before the crop, None for image_size. fit: ``crop`` as open_clip does, ``crop_down`` as
    transformers' CLIPImageProcessor does (they cut an odd rest differently), ``squash`` to the
    square without a crop, as SigLIP's and Otter's training do. resample: Pillow's filter, 3 is
    bicubic. image_mean, image_std: of RGB in 0 to 1. max_pixels: refuse larger files unread.
    transpose: apply EXIF orientation (the peers do not).
    """

    image_size: int = 224
    shortest_edge: int | None = None
    fit: Fit = "crop"
    resample: int = 3
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    max_pixels: int | None = MAX_PIXELS
    transpose: bool = False

    # Fields that Hugging Face's file has no word for.
    OWN: ClassVar[tuple[str, ...]] = ("fit", "max_pixels", "transpose")
    SQUASHES: ClassVar[str] = "CLIPImageProcessor"  # the class that is told to squash

    def __post_init__(self) -> None:
        """Raise MMJaxError for settings that no pipeline has."""
        self.check_word("fit", Fit)
        open_ = ("shortest_edge", "max_pixels")
        self.check_counts("image_size", *(x for x in open_ if getattr(self, x) is not None))
        check_filter(self.resample)
        check_colours(self.image_mean, self.image_std)
        if self.shortest_edge is not None and self.shortest_edge < self.image_size:
            raise MMJaxError(
                f"shortest_edge = {self.shortest_edge} is less than the {self.image_size} pixels "
                "that are cut out; raise it, or lower image_size"
            )

    def check_word(self, name: str, known: Any) -> None:
        """Raise MMJaxError where a field is none of the words of a Literal."""
        if getattr(self, name) not in get_args(known):
            words = ", ".join(get_args(known))
            raise MMJaxError(f"{name} is {getattr(self, name)!r}; one of {words}")

    def check_counts(self, *names: str) -> None:
        """Raise MMJaxError where a field is no number from 1 up."""
        for name in names:
            if not is_count(getattr(self, name)):
                raise MMJaxError(f"{name} is {getattr(self, name)!r}; give a number from 1 up")

    def check_model(self, image_size: int, config: Any) -> None:
        """Raise MMJaxError where a model takes other squares, or normalises them otherwise.

        config: of the model, with its image_mean and image_std.
        """
        if self.image_size != image_size:
            raise MMJaxError(
                f"the processor makes pictures of {self.image_size} pixels and the vision tower "
                f"takes {image_size}; set the processor's image_size to that"
            )
        for name in ("image_mean", "image_std"):
            mine, models = getattr(self, name), getattr(config, name)
            if not np.allclose(mine, models, rtol=0, atol=1e-6):
                raise MMJaxError(
                    f"preprocessor_config.json has {name} {list(mine)} and the model normalises "
                    f"with {list(models)}; make them equal, in config.json or there"
                )

    def normalise(self, levels: np.ndarray) -> np.ndarray:
        """Turn grey levels [..., 3] into float32 [..., 3] as the model sees them."""
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        return (levels.astype(np.float32) / np.float32(255) - mean) / std

    def pixels(
        self, source: ImageSource, prepare: Callable[[Image.Image], Image.Image] | None = None
    ) -> np.ndarray:
        """Bring one picture to [image_size, image_size, 3].

        uint8 grey levels; float32 where it came normalised, [h,w,3] or [3,h,w]. prepare: what
        happens to the RGB picture before it is resized. Raises the BadSamples of ``open_image``.
        """
        side = self.image_size
        if hasattr(source, "__array__") and getattr(source, "ndim", 0):
            array = to_numpy(source)
            if np.issubdtype(array.dtype, np.floating):
                return _normalised(array, source_name(source), side)
            source = array
        name = source_name(source)
        image = open_image(source, max_pixels=self.max_pixels, transpose=self.transpose)
        image = to_rgb(image, name)
        if prepare is not None:
            image = prepare(image)
        if self.fit == "squash":
            return np.asarray(image.resize((side, side), self.resample))
        image = resize_shortest(image, self.shortest_edge or side, self.resample)
        return center_crop(image, side, round_down=self.fit == "crop_down")

    def alike(self, pixels: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Return pixels [..., 3] as they are, or all normalised where some of them are."""
        if all(p.dtype == np.uint8 for p in pixels):
            return pixels
        return [self.normalise(p) if p.dtype == np.uint8 else p for p in pixels]

    def grey(self, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels [..., 3] of either kind into uint8 grey levels, to look at."""
        if pixels.dtype == np.uint8:
            return pixels
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        levels = (np.float32(pixels) * std + mean) * 255
        return np.uint8(np.clip(np.round(levels), 0, 255))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Read the preprocessor_config.json of a CLIP or SigLIP image processor, any version's.

        Raises MMJaxError on settings mmjax cannot follow.
        """
        data = merged(data)
        crop = data.get("do_center_crop", True)
        data = {key: value for key, value in data.items() if value is not None}
        steps = ("do_resize", "do_rescale", "do_normalize")
        check_rescaled(data, steps, "a tower expects resized, normalised pixels")
        siglip = str(data.get("image_processor_type")).startswith("Siglip")
        size = data.get("size", cls.image_size)
        shortest = size
        if isinstance(size, Mapping):
            check_keys(size, (("shortest_edge",), ("height", "width")))
            shortest = size.get("shortest_edge")
        squash = shortest is None
        side = _square(size, "size") if squash else shortest
        if not squash and not crop:
            raise MMJaxError(
                f"do_center_crop = false with size = {size}: the pictures would not be square; set "
                "it to true, or give size a height and a width"
            )
        cropped = crop and "crop_size" in data
        image_size = _square(data["crop_size"], "crop_size") if cropped else side
        if squash and image_size != side:
            raise MMJaxError(
                f"size = {size} with crop_size = {data['crop_size']}: a squashed picture is not "
                "cropped; set do_center_crop to false"
            )
        fields = {
            "image_size": image_size,
            "shortest_edge": None if side == image_size else side,
            "fit": "squash" if squash else "crop_down",
            "resample": data.get("resample", cls.resample),
            "image_mean": _each(data.get("image_mean", SIGLIP_MEAN if siglip else CLIP_MEAN)),
            "image_std": _each(data.get("image_std", SIGLIP_STD if siglip else CLIP_STD)),
        }
        return cls(**{**fields, **own_settings(data, cls.OWN)})

    def to_hf(self) -> dict[str, Any]:
        """Write the preprocessor_config.json that transformers' image processors load."""
        square = {"height": self.image_size, "width": self.image_size}
        squash = self.fit == "squash"
        return {
            "image_processor_type": self.SQUASHES if squash else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square if squash else {"shortest_edge": self.shortest_edge or self.image_size},
            "resample": self.resample,
            "do_center_crop": not squash,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            OWN_KEY: {name: getattr(self, name) for name in self.OWN},
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Write preprocessor_config.json into a folder."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, _FILES[1]), "w", encoding="utf-8") as file:
            json.dump(self.to_hf(), file, indent=2)
            file.write("\n")


def read_image_file(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Read what a folder says of its pictures, None for nothing; errors as ``read_json``."""
    new, old = (read_json(folder, file) for file in _FILES)
    return new if new and {"image_processor", "size", OWN_KEY} & set(new) else old


def is_own(data: Mapping[str, Any] | None) -> bool:
    """Tell whether mmjax wrote such a file: it then holds every setting."""
    return bool(data) and OWN_KEY in data


def _each(value: Any) -> Any:
    """Return one value a channel: of a list as they are, of a number the same three times."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * 3


def _square(value: Any, name: str) -> int:
    """Read the side of a square, given as a number or as height and width."""
    side, other = value, value
    if isinstance(value, Mapping):
        side, other = value.get("height"), value.get("width")
    if not isinstance(side, int) or side != other:
        raise MMJaxError(f"{name} = {value!r}: expected the side of a square")
    return side


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
