"""The settings of Fuyu's processor, read from and written as Hugging Face's files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.data.images import MAX_PIXELS
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
from mmjax.types import MMJaxError, is_count, is_number

_FILES = ("processor_config.json", "preprocessor_config.json")
_OPEN_KEY = "mmjax_max_size"  # beside HF's ``size``, which cannot say "no limit"
_NO_WORD = ("max_pixels", "transpose")  # nor has HF's file for these

_OPEN = ("max_height", "max_width", "max_image_tokens", "max_pixels")
_LEAST = {"patch_size": 1, "num_channels": 1, **dict.fromkeys(_OPEN, 1), "max_image_tokens": 2}


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """How Fuyu sees an image, and its token ids where no tokenizer says them.

    max_height, max_width: the box an image is shrunk into, None for no limit. Never enlarged.
    max_image_tokens: shrink an image further until its patches and row ends are at most so many.
    padding_value: grey level (0-255) that fills the last row and column of patches. The peers pad
        with 1.0 before the division by 255, so the padding is near black, not white.
    max_pixels: refuse larger files unread. transpose: apply EXIF orientation (the peers do not).
    """

    patch_size: int = 30
    num_channels: int = 3
    max_height: int | None = 1080
    max_width: int | None = 1920
    max_image_tokens: int | None = None
    resample: int = 2
    padding_value: float = 1.0
    image_mean: float | tuple[float, ...] = 0.5
    image_std: float | tuple[float, ...] = 0.5
    max_pixels: int | None = MAX_PIXELS
    transpose: bool = False
    image_token_id: int = 71011
    newline_token_id: int = 71019
    answer_token_id: int = 71122
    bos_token_id: int = 1
    eos_token_id: int = 71013
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Raise MMJaxError for settings that no pipeline has."""
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not (is_count(value, least) or (value is None and name in _OPEN)):
                none = ", or None for no limit" * (name in _OPEN)
                raise MMJaxError(f"{name} is {value!r}; give a number from {least} up{none}")
        check_filter(self.resample)
        check_colours(self.image_mean, self.image_std, self.num_channels)
        if not is_number(self.padding_value) or not 0 <= self.padding_value <= 255:
            raise MMJaxError(
                f"padding_value is {self.padding_value!r}; give a grey level from 0 to 255"
            )

    @property
    def patch_dim(self) -> int:
        """Values in one patch."""
        return self.patch_size * self.patch_size * self.num_channels

    def normalise(self, levels: np.ndarray) -> np.ndarray:
        """Turn grey levels [..., c] into float32 [..., c] as the model sees them."""
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        return (levels.astype(np.float32) / np.float32(255) - mean) / std

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ProcessorConfig:
        """Read a preprocessor_config.json (transformers 4) or processor_config.json (5).

        ``size`` and ``patch_size`` may be numbers or dicts; the first release's ``target_height``
        and ``target_width`` are understood. Raises MMJaxError on settings mmjax cannot follow.
        """
        data = {key: value for key, value in merged(data).items() if value is not None}
        check_rescaled(data, ("do_rescale", "do_normalize"), "Fuyu expects normalised pixels")
        if data.get("padding_mode", "constant") != "constant":
            raise MMJaxError(
                f"padding_mode = {data['padding_mode']!r}: only 'constant' is supported"
            )
        height, width = _height_width(data.get("size", {}), "size")
        height = data.get("target_height", cls.max_height) if height is None else height
        width = data.get("target_width", cls.max_width) if width is None else width
        if data.get("do_resize") is False:
            height = width = None
        if _OPEN_KEY in data:
            height, width = _height_width(data[_OPEN_KEY], _OPEN_KEY)
        sides = _height_width(data.get("patch_size", cls.patch_size), "patch_size")
        if sides[0] != sides[1]:
            raise MMJaxError(f"patch_size = {sides}: Fuyu's patches are square")
        return cls(
            patch_size=sides[0],
            max_height=height,
            max_width=width,
            max_image_tokens=data.get("max_image_tokens"),
            resample=data.get("resample", cls.resample),
            padding_value=data.get("padding_value", cls.padding_value),
            image_mean=_number_or_tuple(data.get("image_mean", cls.image_mean)),
            image_std=_number_or_tuple(data.get("image_std", cls.image_std)),
            **own_settings(data, _NO_WORD),
        )

    def to_hf(self) -> dict[str, Any]:
        """Write the preprocessor_config.json that transformers 4 and 5 both load.

        A box without limits has no word there: transformers then gets Fuyu's own 1080x1920, and
        mmjax reads its own keys back, as it does ``max_image_tokens``.
        """
        height = ProcessorConfig.max_height if self.max_height is None else self.max_height
        width = ProcessorConfig.max_width if self.max_width is None else self.max_width
        data: dict[str, Any] = {
            "image_processor_type": "FuyuImageProcessor",
            "processor_class": "FuyuProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": self.resample,
            "do_pad": True,
            "padding_value": self.padding_value,
            "padding_mode": "constant",
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "patch_size": {"height": self.patch_size, "width": self.patch_size},
        }
        if None in (self.max_height, self.max_width):
            data[_OPEN_KEY] = [self.max_height, self.max_width]
        if self.max_image_tokens is not None:
            data["max_image_tokens"] = self.max_image_tokens
        own = {name: getattr(self, name) for name in _NO_WORD}
        if any(value != getattr(ProcessorConfig, name) for name, value in own.items()):
            data[OWN_KEY] = own
        return data

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> ProcessorConfig:
        """Read a model folder: the processor's file and, for ids and patch, ``config.json``.

        Missing files leave Fuyu-8B's values. Raises MMJaxError naming a file that is not JSON.
        """
        new, old = (read_json(folder, file) for file in _FILES)
        # transformers 4 may leave a processor_config.json that says nothing about images.
        telling = new if new and {"image_processor", "patch_size", "size"} & set(new) else old
        model = read_json(folder, "config.json") or {}
        config = cls.from_hf(telling or {})
        changes: dict[str, Any] = {}
        if not telling and isinstance(model.get("patch_size"), int):
            changes["patch_size"] = model["patch_size"]
        if isinstance(model.get("num_channels"), int):
            changes["num_channels"] = model["num_channels"]
        text = model.get("text_config") or {}
        for key in ("image_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
            value = text.get(key) if model.get(key) is None else model[key]
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int):
                changes[key] = value
        return dataclasses.replace(config, **changes)

    def save(self, folder: str | os.PathLike) -> None:
        """Write preprocessor_config.json into a folder."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, _FILES[1]), "w", encoding="utf-8") as file:
            json.dump(self.to_hf(), file, indent=2)
            file.write("\n")


def _height_width(value: Any, name: str) -> tuple[int | None, int | None]:
    """Read a side given as a number, a pair or a dict."""
    if isinstance(value, Mapping):
        if value:
            check_keys(value, (("height", "width"),))
        return value.get("height"), value.get("width")
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0], value[1]
    raise MMJaxError(f"{name} = {value!r}: expected a number or {{height, width}}")


def _number_or_tuple(value: Any) -> float | tuple[float, ...]:
    """Make a JSON list hashable."""
    return tuple(value) if isinstance(value, list) else value
