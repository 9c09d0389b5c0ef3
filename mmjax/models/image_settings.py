"""What the files of image processors may say, checked before a picture is read.

People edit these files and give the same settings on the command line, so that any value may stand
anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mmjax.types import MMJaxError, is_number

OWN_KEY = "mmjax"
"""The key, in a file of Hugging Face's, of what that has no word for."""

_FILTERS = "0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming"


def merged(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file, those below ``image_processor`` (transformers 5) first.

    Raises MMJaxError where that is no object.
    """
    inner = data.get("image_processor") or {}
    if not isinstance(inner, Mapping):
        raise MMJaxError(f"image_processor = {inner!r}: expected an object of settings")
    return {**data, **inner}


def own_settings(data: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return what a file states under our own key of these names; MMJaxError for no object."""
    stated = data.get(OWN_KEY) or {}
    if not isinstance(stated, Mapping):
        raise MMJaxError(f"{OWN_KEY} = {stated!r}: expected an object of settings")
    return {name: value for name, value in stated.items() if name in names}


def check_rescaled(data: Mapping[str, Any], steps: tuple[str, ...], seen_by: str) -> None:
    """Raise MMJaxError where a file turns one of the steps off, or grey levels are not over 255."""
    for key in steps:
        if data.get(key) is False:
            raise MMJaxError(f"{key} = false: {seen_by}; set it to true")
    factor = data.get("rescale_factor", 1 / 255)
    if not is_number(factor) or not abs(factor * 255 - 1) <= 1e-6:
        raise MMJaxError(f"rescale_factor = {factor!r}: only 1/255 is supported")


def check_keys(size: Mapping[str, Any], known: tuple[tuple[str, ...], ...]) -> None:
    """Raise MMJaxError unless a ``size`` has exactly the keys of one of the known forms."""
    keys = {key for key, value in size.items() if value is not None}
    if keys not in map(set, known):
        forms = " or ".join(" and ".join(form) for form in known)
        raise MMJaxError(f"size = {dict(size)!r}: cannot be followed; it takes {forms}")


def check_filter(resample: Any) -> None:
    """Raise MMJaxError unless it is the number of one of Pillow's filters."""
    if not isinstance(resample, int) or isinstance(resample, bool) or not 0 <= resample <= 5:
        raise MMJaxError(f"resample is {resample!r}; give one of Pillow's filters: {_FILTERS}")


def check_colours(mean: Any, std: Any, channels: int = 3) -> None:
    """Raise MMJaxError unless each is a number or one a channel, and no deviation is 0."""
    for name, value in (("image_mean", mean), ("image_std", std)):
        each = value if isinstance(value, list | tuple) else [value] * channels
        if len(each) != channels or not all(map(is_number, each)):
            raise MMJaxError(f"{name} is {value!r}; give a number, or {channels}: one a channel")
        if name == "image_std" and not all(each):
            raise MMJaxError(f"image_std is {value!r}; what divides pixels cannot be 0")


def stated_colours(hf: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return ``image_mean`` and ``image_std`` of a config.json, those that it states, per channel.

    Raises MMJaxError as ``check_colours`` does.
    """
    stated = {key: hf[key] for key in ("image_mean", "image_std") if hf.get(key) is not None}
    check_colours(stated.get("image_mean", 0.0), stated.get("image_std", 1.0))
    return {key: tuple(x if isinstance(x, list | tuple) else [x] * 3) for key, x in stated.items()}
