"""Pictures for the report: kept beside the predictions, embedded as data URIs."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence

from PIL import Image

from mmjax.data import images as im
from mmjax.data.limits import spread
from mmjax.types import BadSample, ImageSource, Record

_SHOWN_SIDE = 448  # pixels: a report with a hundred pictures stays a few megabytes
MOST_SHOWN = 9  # of one question
_PNG_SIDE = 128  # small pictures are kept without loss: single pixels matter in them


def picture_size(records: Iterable[Record]) -> int | None:
    """Return the longest side of most pictures (their median), None without any."""
    sides = []
    for record in records:
        for first in _frames(record.images[0])[:1] if record.images else ():
            try:
                sides.append(max(im.open_image(first).size))
            except BadSample:
                continue
    return sorted(sides)[len(sides) // 2] if sides else None


def save_pictures(record: Record, folder: str, index: int) -> list[str]:
    """Keep the pictures of a record for the report; returns their paths.

    Frames of a video count as pictures. Of more than nine so many, evenly spread.
    """
    every = [one for source in record.images for one in _frames(source)]
    paths = []
    for place in spread(len(every), min(len(every), MOST_SHOWN)):
        try:
            picture = im.to_rgb(im.open_image(every[place]))
        except BadSample:
            continue
        os.makedirs(folder, exist_ok=True)
        if max(picture.size) > 2 * _SHOWN_SIDE:
            picture.thumbnail((2 * _SHOWN_SIDE, 2 * _SHOWN_SIDE))
        small = max(picture.size) <= 2 * _PNG_SIDE
        name = f"{index}_{place}" if len(every) > 1 else str(index)
        paths.append(os.path.join(folder, f"{name}.{'png' if small else 'jpg'}"))
        picture.save(paths[-1], **({} if small else {"quality": 92}))
    return paths


def _frames(source: ImageSource) -> Sequence[ImageSource]:
    return source if isinstance(source, list | tuple) else (source,)


def data_uri(path: str, longest: int | None = None) -> tuple[str, int, int] | None:
    """Encode a picture for HTML as the model saw it; returns (URI, width, height) or None.

    longest: reduce the longest side to this, as the evaluation did.
    """
    try:
        picture = im.to_rgb(im.open_image(path))
    except BadSample:
        return None
    side = min(longest or _SHOWN_SIDE, _SHOWN_SIDE)
    if max(picture.size) > side:
        width, height = im.fit_size(*picture.size, side, side)
        picture = Image.fromarray(im.resize(picture, max(width, 1), max(height, 1)))
    small = max(picture.size) <= _PNG_SIDE
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind};base64,{encoded}", picture.width, picture.height
