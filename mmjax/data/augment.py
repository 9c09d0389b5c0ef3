"""Changes to the pictures of training records, by name; each is drawn anew in every epoch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmjax.data import images as im
from mmjax.data.resizing import each_picture, pad_at_random
from mmjax.types import BadSample, ImageSource, MMJaxError, Record, nearest

_PLACES = re.compile(r"<(box|point)>.*?</\1>", re.DOTALL)  # of a picture, as Fuyu writes them

Augment = Callable[[Record, np.random.Generator], Record]
Augments = Sequence[str] | Mapping[str, Sequence[str]]
"""Names in the order in which they are applied, for all sources or for each source by its name."""


def flip_at_random(record: Record, rng: np.random.Generator, share: float = 0.5) -> Record:
    """Mirror all images of a record left to right, with probability ``share``.

    OpenFlamingo draws once for a whole batch of LAION's pictures, here each record has its own
    draw. Words such as "left" are not changed: this is for captions that say nothing of sides.
    """
    if not record.images or rng.random() >= share:
        return record
    return dataclasses.replace(
        record, images=tuple(each_picture(source, _mirrored) for source in record.images)
    )


AUGMENTS: dict[str, Augment] = {"square_pad": pad_at_random, "flip": flip_at_random}


def augments_of(wanted: Augments, names: Sequence[str]) -> tuple[tuple[Augment, ...], ...]:
    """Return the changes for each source, in the order of ``names``.

    Raises MMJaxError for a change or a source that does not exist, with the nearest name.
    """
    if isinstance(wanted, Mapping):
        for name in wanted:
            if name not in names:
                _unknown("augment: source", name, names)
    else:
        wanted = dict.fromkeys(names, wanted)
    for name in (n for some in wanted.values() for n in some):
        if name not in AUGMENTS:
            _unknown("augment", name, AUGMENTS)
    return tuple(tuple(AUGMENTS[n] for n in wanted.get(name, ())) for name in names)


def check_movable(record: Record) -> None:
    """Raise BadSample("coordinates") where a text names places of pictures that are to be changed.

    Every change moves what a picture shows, and the numbers in the text would stay.
    """
    for message in record.messages:
        if found := _PLACES.search(message.text):
            raise BadSample(
                "coordinates",
                f"{found[0]} is a place in a picture, which data.augment moves while its numbers "
                "stay; leave data.augment away, or give it to the other sources by name",
            )


def _mirrored(source: ImageSource) -> ImageSource:
    image = im.open_image(source)
    pixels = np.asarray(im.to_rgb(image, im.source_name(source)))
    return im.with_origin(np.ascontiguousarray(pixels[:, ::-1]), image, mirrored=True)


def _unknown(what: str, name: str, known) -> None:
    near = nearest(str(name), known)
    raise MMJaxError(f"{what} {name!r} is unknown{near} (there are {', '.join(known)})")
