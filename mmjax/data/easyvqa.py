"""easy-VQA: questions about one coloured shape on a 64x64 picture; needs ``pip install easy-vqa``.

4,000 training pictures with 38,575 questions, 1,000 test pictures with 9,673; thirteen answers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np

from mmjax.data.images import load_rgb
from mmjax.types import Message, MMJaxError, Record

ANSWERS = (
    *("circle", "green", "red", "gray", "yes", "teal", "black", "rectangle"),
    *("yellow", "triangle", "brown", "blue", "no"),
)
SHAPES = ("circle", "rectangle", "triangle")
SPLITS = ("train", "test")
GROUPS = ("yes/no", "color", "shape")


class EasyVQASource:
    """The questions of one split, in the package's order; images are file paths.

    groups: keep questions of these kinds (``yes/no``, ``color``, ``shape``); None keeps all.
    placements: how many times the split is gone through, each time with every picture's shape
    painted at another place on its background (a function of (seed, index)); 1 leaves the
    pictures as they are. 4,000 pictures show too few places to learn shapes from.
    meta: ``answers`` (one), ``group`` (told from the answer), ``image_id``.
    Raises MMJaxError when the package is not installed, or for an unknown split or group.
    """

    def __init__(
        self,
        split: str,
        *,
        groups: Sequence[str] | None = None,
        placements: int = 1,
        seed: int = 0,
    ):
        if split not in SPLITS:
            raise MMJaxError(f"easy-VQA has no split {split!r}; it has {', '.join(SPLITS)}")
        unknown = sorted(set(groups or ()) - set(GROUPS))
        if unknown or placements < 1:
            raise MMJaxError(
                f"easy-VQA groups {groups}, placements {placements}: groups are among "
                f"{', '.join(GROUPS)}, and placements is at least 1"
            )
        self.split, self.placements, self.seed = split, placements, seed
        self.groups = None if groups is None else tuple(groups)
        self._load()

    def __len__(self) -> int:
        return len(_kept(self.split, self.groups)) * self.placements

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"easy-VQA {self.split}: index {index} of {len(self)}")
        texts, answers, ids, paths = self._load()
        kept = _kept(self.split, self.groups)
        line = int(kept[index % len(kept)])
        answer, image = answers[line], ids[line]
        picture = paths[image]
        if self.placements > 1:
            picture = move_shape(picture, np.random.default_rng((self.seed, index)))
        meta = {
            "id": f"{self.split}/{line}",
            "source": f"easy-vqa/{self.split}",
            "line": line,
            "answers": [answer],
            "group": question_kind(answer),
            "image_id": image,
        }
        messages = (Message("user", texts[line]), Message("assistant", answer))
        return Record(messages, (picture,), meta)

    def _load(self):
        return _read(self.split)


@functools.lru_cache(maxsize=16)
def _kept(split: str, groups: tuple[str, ...] | None) -> np.ndarray:
    """Return which lines of a split are questions of these groups, once for each process."""
    answers = _read(split)[1]
    return np.array([i for i, a in enumerate(answers) if not groups or question_kind(a) in groups])


@functools.lru_cache(maxsize=8192)
def cut_shape(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture filled with its background, uint8[h,w,3], and its one shape, cut out.

    The background is uniform: it is the most frequent corner, and the shape is what differs.
    Remembered for each process: 4,000 pictures take some 60 MB.
    """
    picture = load_rgb(path)
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    alike = (corners[:, None] == corners[None]).all(-1).sum(1)
    background = corners[alike.argmax()]
    inside = (picture != background).any(-1)
    empty = np.empty_like(picture)
    empty[:] = background
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return empty, picture[:0, :0]
    shape = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return empty, np.ascontiguousarray(shape)


def move_shape(path: str, rng: np.random.Generator) -> np.ndarray:
    """Paint the shape of a picture at another place, half the time mirrored; uint8[h,w,3]."""
    empty, shape = cut_shape(path)
    if rng.random() < 0.5:
        shape = shape[:, ::-1]
    out = empty.copy()
    (h, w), (full_h, full_w) = shape.shape[:2], out.shape[:2]
    top, left = int(rng.integers(full_h - h + 1)), int(rng.integers(full_w - w + 1))
    out[top : top + h, left : left + w] = shape
    return out


def question_kind(answer: str) -> str:
    """Tell the kind of a question from its answer: ``yes/no``, ``shape`` or ``color``."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"


@functools.lru_cache(maxsize=2)
def _read(split: str):
    """Read a split once for each process, so that a pickled source stays small."""
    try:
        import easy_vqa
    except ImportError as e:
        raise MMJaxError(
            "easy-VQA needs its data package: pip install 'mmjax[recipes]' (or easy-vqa==1.0)"
        ) from e
    texts, answers, ids = getattr(easy_vqa, f"get_{split}_questions")()
    folder = os.path.join(os.path.dirname(easy_vqa.__file__), "data", split, "images")
    paths = {i: os.path.join(folder, f"{i}.png") for i in set(ids)}
    return texts, answers, ids, paths
