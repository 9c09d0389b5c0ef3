"""The settings of Flamingo's processor, read from and written as Hugging Face's files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from mmjax.data.images import MAX_PIXELS
from mmjax.models.normalisation import CLIP_MEAN, CLIP_STD
from mmjax.models.json_files import read_json
from mmjax.types import MMJaxError

AttendMode = Literal["previous", "next", "random"]
Fit = Literal["crop", "crop_down", "squash"]

_FILES = ("processor_config.json", "preprocessor_config.json")
_OWN = "mmjax"  # the key of what Hugging Face's file has no word for
_OWN_FIELDS = ("fit", "frames", "attend_mode", "bos", "answer_token", "image_mark")
_IDS = ("media_token_id", "eoc_token_id", "answer_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """How Flamingo sees an image, and its token ids where no tokenizer says them.

    image_size: side of the square the vision tower takes; shortest_edge: what the shortest side is
    resized to before the crop, None for image_size. fit: ``crop`` as open_clip does, ``crop_down``
    as transformers' CLIPImageProcessor does (they cut an odd rest differently), ``squash`` to the
    square without a crop, as Otter's training does. resample: Pillow's filter, 3 is bicubic.
    frames: pictures in one medium, 1 but for video models.
    attend_mode: which medium text looks at: the ``previous`` one, the ``next`` (version 1 with
    attend_previous=False), or one of the two for each sample at ``random`` (version 1 with
    use_media_placement_augmentation).
    bos: begin with <bos>; None does as the tokenizer does (LLaMA's yes, GPT-NeoX's no), True as
    Otter's training does with any. answer_token: add Otter's ``<answer>`` to a tokenizer that lacks
    it. image_mark: the token that stands for a medium, and its mark in a string prompt.
    max_pixels: refuse larger files unread. transpose: apply EXIF orientation (the peers do not).
    """

    image_size: int = 224
    shortest_edge: int | None = None
    fit: Fit = "crop"
    resample: int = 3
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    frames: int = 1
    attend_mode: AttendMode = "previous"
    bos: bool | None = None
    answer_token: bool = False
    image_mark: str = "<image>"
    max_pixels: int | None = MAX_PIXELS
    transpose: bool = False
    media_token_id: int | None = None
    eoc_token_id: int | None = None
    answer_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Raise MMJaxError for settings that no pipeline has."""
        for name, known in (("fit", get_args(Fit)), ("attend_mode", get_args(AttendMode))):
            if getattr(self, name) not in known:
                raise MMJaxError(f"{name} is {getattr(self, name)!r}; one of {', '.join(known)}")
        for name in ("image_size", "frames"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise MMJaxError(f"{name} is {getattr(self, name)!r}; give a number from 1 up")
        if self.shortest_edge is not None and self.shortest_edge < self.image_size:
            raise MMJaxError(
                f"shortest_edge = {self.shortest_edge} is less than the {self.image_size} pixels "
                "that are cut out; raise it, or lower image_size"
            )
        if not self.image_mark:
            raise MMJaxError("image_mark is empty; give the token that stands for an image")

    @property
    def patch_dim(self) -> int:
        """Values in one medium: frames, rows, columns, channels."""
        return self.frames * self.image_size * self.image_size * 3

    def normalise(self, levels: np.ndarray) -> np.ndarray:
        """Turn grey levels [..., 3] into float32 [..., 3] as the model sees them."""
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        return (levels.astype(np.float32) / np.float32(255) - mean) / std

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ProcessorConfig:
        """Read the preprocessor_config.json of a CLIPImageProcessor, any version's.

        Raises MMJaxError on settings mmjax cannot follow.
        """
        data = {**data, **data.get("image_processor", {})}
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if data.get(key) is False:
                raise MMJaxError(f"{key} = false: CLIP expects resized, normalised pixels")
        factor = data.get("rescale_factor", 1 / 255)
        if abs(factor * 255 - 1) > 1e-6:
            raise MMJaxError(f"rescale_factor = {factor}: only 1/255 is supported")
        size = data.get("size", cls.image_size)
        shortest = size.get("shortest_edge") if isinstance(size, Mapping) else size
        squash = shortest is None
        side = _square(size, "size") if squash else shortest
        if not squash and data.get("do_center_crop") is False:
            raise MMJaxError(
                f"do_center_crop = false with size = {size}: the pictures would not be square; set "
                "it to true, or give size a height and a width"
            )
        cropped = data.get("do_center_crop", True) and "crop_size" in data
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
            "resample": int(data.get("resample", cls.resample)),
            "image_mean": tuple(data.get("image_mean", cls.image_mean)),
            "image_std": tuple(data.get("image_std", cls.image_std)),
        }
        own = {k: v for k, v in data.get(_OWN, {}).items() if k in _OWN_FIELDS}
        return cls(**{**fields, **own})

    def to_hf(self) -> dict[str, Any]:
        """Write the preprocessor_config.json that transformers' CLIPImageProcessor loads."""
        square = {"height": self.image_size, "width": self.image_size}
        squash = self.fit == "squash"
        return {
            "image_processor_type": "CLIPImageProcessor",
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
            _OWN: {name: getattr(self, name) for name in _OWN_FIELDS},
        }

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> ProcessorConfig:
        """Read a checkpoint folder: the processor's file and, for ids and size, ``config.json``.

        Without a processor's file it is open_clip's transform at the tower's size. Raises
        MMJaxError naming a file that is not JSON.
        """
        new, old = (read_json(folder, file) for file in _FILES)
        telling = new if new and {"image_processor", "size", _OWN} & set(new) else old
        model = read_json(folder, "config.json") or {}
        config = cls.from_hf(telling) if telling else cls()
        changes: dict[str, Any] = {}
        vision = model.get("vision_config") or {}
        if not telling and isinstance(vision.get("image_size"), int):
            changes["image_size"] = vision["image_size"]
        text = model.get("text_config") or {}
        for key in _IDS:
            value = model.get(key, text.get(key))
            if isinstance(value, int):
                changes[key] = value
        return dataclasses.replace(config, **changes)

    def save(self, folder: str | os.PathLike) -> None:
        """Write preprocessor_config.json into a folder."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, _FILES[1]), "w", encoding="utf-8") as file:
            json.dump(self.to_hf(), file, indent=2)
            file.write("\n")


def _square(value: Any, name: str) -> int:
    """Read the side of a square, given as a number or as height and width."""
    side, other = value, value
    if isinstance(value, Mapping):
        side, other = value.get("height"), value.get("width")
    if not isinstance(side, int) or side != other:
        raise MMJaxError(f"{name} = {value!r}: expected the side of a square")
    return side
