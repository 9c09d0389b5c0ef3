"""The settings of Bunny's processor, read from and written as Hugging Face's files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from mmjax.models.image_settings import stated_colours
from mmjax.models.json_files import read_json
from mmjax.models.normalisation import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD
from mmjax.models.square_images import Fit, SquareImages, is_own, read_image_file
from mmjax.types import MMJaxError

AspectRatio = Literal["pad", "square"]
S2_SCALES = (384, 768, 1152)
"""Of S2, where config.json says none: the peer's."""


@dataclasses.dataclass(frozen=True)
class ProcessorConfig(SquareImages):
    """How Bunny sees an image and how long a sample may be.

    Fields of ``SquareImages``, by default SigLIP's at 384 pixels, and: image_aspect_ratio: ``pad``
    puts a picture into the middle of a square of the mean colour first, ``square`` leaves it to
    ``fit``. image_tokens: that stand for one image. model_max_length: tokens of a training sample,
    text and images, None for no limit beside the row's. bos: begin with <bos>; None does as the
    tokenizer does. end_token: the token that ends an answer, by its text; None for eos_token_id.
    eos_token_id: of config.json; None for the tokenizer's own.
    """

    image_size: int = 384
    fit: Fit = "squash"
    image_mean: tuple[float, ...] = SIGLIP_MEAN
    image_std: tuple[float, ...] = SIGLIP_STD
    image_aspect_ratio: AspectRatio = "square"
    image_tokens: int = 729
    model_max_length: int | None = 2048
    bos: bool | None = None
    end_token: str | None = None
    eos_token_id: int | None = None

    OWN: ClassVar[tuple[str, ...]] = (
        *(*SquareImages.OWN, "image_aspect_ratio", "image_tokens"),
        *("model_max_length", "bos", "end_token"),
    )
    SQUASHES: ClassVar[str] = "SiglipImageProcessor"

    def __post_init__(self) -> None:
        """Raise MMJaxError for settings that no pipeline has."""
        super().__post_init__()
        self.check_word("image_aspect_ratio", AspectRatio)
        self.check_counts("image_tokens", *["model_max_length"] * bool(self.model_max_length))

    @property
    def patch_dim(self) -> int:
        """Values of one image: rows, columns, channels."""
        return self.image_size * self.image_size * 3

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> ProcessorConfig:
        """Read a model folder: the image processor's file, and config.json.

        What the first leaves open config.json tells: the tower's ``vision_config``,
        ``image_aspect_ratio``, ``tokenizer_model_max_length``, the scales of S2 and, in mmjax's own
        folders, ``image_tokens``. Raises MMJaxError naming a file that is not JSON.
        """
        data = read_image_file(folder)
        model = read_json(folder, "config.json") or {}
        config = cls.from_hf(data) if data else cls(**seen_by_tower(model))
        changes = {} if is_own(data) else _told_by_model(model)
        eos = model.get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if isinstance(eos, int):
            changes["eos_token_id"] = eos
        return dataclasses.replace(config, **changes)


def seen_by_tower(model: Mapping[str, Any]) -> dict[str, Any]:
    """Read from config.json how its tower was shown pictures, as options of the processor.

    ``image_size`` is the tower's own, below the largest scale of S2. Nothing without a
    ``vision_config``.
    """
    vision = model.get("vision_config") or {}
    if not vision:
        return {}
    kind = str(vision.get("model_type"))
    siglip = "siglip" in kind
    return {
        "image_size": vision.get("image_size", ProcessorConfig.image_size),
        # EVA-CLIP's transform is torchvision's, CLIP's is transformers' own.
        "fit": "squash" if siglip else "crop" if "eva" in kind else "crop_down",
        "image_mean": SIGLIP_MEAN if siglip else CLIP_MEAN,
        "image_std": SIGLIP_STD if siglip else CLIP_STD,
        **stated_colours(model),
    }


def _told_by_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Read from config.json what no image processor's file says."""
    told: dict[str, Any] = {}
    if "image_aspect_ratio" in model:  # the peer: all but "pad" is no padding
        told["image_aspect_ratio"] = "pad" if model["image_aspect_ratio"] == "pad" else "square"
    if model.get("tokenizer_model_max_length"):
        told["model_max_length"] = model["tokenizer_model_max_length"]
    if model.get("image_tokens"):
        told["image_tokens"] = model["image_tokens"]
    if scales := s2_scales(model):
        told |= {"image_size": max(scales), "shortest_edge": None}
    return told


def s2_scales(hf: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Read the sides of S2 from ``use_s2`` and ``s2_scales``, a string of numbers in the peer's."""
    if not hf.get("use_s2"):
        return None
    stated = hf.get("s2_scales") or S2_SCALES
    try:
        return tuple(map(int, stated.split(",") if isinstance(stated, str) else stated))
    except (ValueError, TypeError) as error:
        raise MMJaxError(f"s2_scales is {stated!r}; give sides in pixels: 384,768,1152") from error
