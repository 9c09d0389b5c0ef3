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
CAPTION_QUESTION = "what is in the image?"


class EasyVQASource:
    """The questions of one split, in the package's order; images are file paths.

    groups: keep questions of these kinds (``yes/no``, ``color``, ``shape``); None keeps all.
    words: keep questions that hold one of these words, such as ``SHAPES``; None keeps all.
    placements: how many times the split is gone through, each time with every picture's shape
    painted at another place on its background (a function of (seed, index)); 1 leaves the
    pictures as they are. 4,000 pictures show too few places to learn shapes from.
    told: text alone; where a picture would stand, its caption stands. Pictures without one (see
    ``EasyVQACaptions``) are left out.
    meta: ``answers`` (one), ``group`` (told from the answer), ``image_id``.
    Raises MMJaxError when the package is not installed, for an unknown split or group, or where no
    question is kept.
    """

    def __init__(
        self,
        split: str,
        *,
        groups: Sequence[str] | None = None,
        words: Sequence[str] | None = None,
        placements: int = 1,
        told: bool = False,
        seed: int = 0,
    ):
        _check(split, placements)
        if unknown := sorted(set(groups or ()) - set(GROUPS)):
            raise MMJaxError(
                f"easy-VQA has no group {unknown[0]!r}; groups are among {', '.join(GROUPS)}"
            )
        self.split, self.placements, self.told, self.seed = split, placements, told, seed
        self.groups = None if groups is None else tuple(groups)
        self.words = None if words is None else tuple(words)
        if not len(self._lines()):
            raise MMJaxError(
                f"easy-VQA {split} has no question of the groups {self.groups or GROUPS} that "
                f"holds one of {self.words}; give words of its questions, in small letters, such "
                f"as {', '.join(SHAPES)}"
            )

    def __len__(self) -> int:
        return len(self._lines()) * self.placements

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"easy-VQA {self.split}: index {index} of {len(self)}")
        texts, answers, ids, _ = _read(self.split)
        kept = self._lines()
        line = int(kept[index % len(kept)])
        answer, image = answers[line], ids[line]
        meta = {
            "id": f"{self.split}/{line}",
            "source": f"easy-vqa/{self.split}",
            "line": line,
            "answers": [answer],
            "group": question_kind(answer),
            "image_id": image,
        }
        return _record(self, index, texts[line], answer, meta)

    def _lines(self) -> np.ndarray:
        return _kept(self.split, self.groups, self.words, self.told)


class EasyVQACaptions:
    """A caption for each picture of a split: ``a red circle``.

    Colour and shape are what its questions and their answers tell; pictures of which they do not
    tell both are left out: 3,181 are left for training and 791 for testing. placements, told, and
    what it raises: as for ``EasyVQASource``.
    """

    def __init__(self, split: str, *, placements: int = 1, told: bool = False, seed: int = 0):
        _check(split, placements)
        self.split, self.placements, self.told, self.seed = split, placements, told, seed
        _captions(split)

    def __len__(self) -> int:
        return len(_captions(self.split)) * self.placements

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"easy-VQA captions {self.split}: index {index} of {len(self)}")
        captions = _captions(self.split)
        image = _captioned(self.split)[index % len(captions)]
        caption = captions[image]
        meta = {
            "id": f"{self.split}/{image}",
            "source": f"easy-vqa-captions/{self.split}",
            "answers": [caption],
            "image_id": image,
        }
        return _record(self, index, CAPTION_QUESTION, caption, meta)


def _check(split: str, placements: int) -> None:
    """Raise MMJaxError for an unknown split, or placements below 1."""
    if split not in SPLITS:
        raise MMJaxError(f"easy-VQA has no split {split!r}; it has {', '.join(SPLITS)}")
    if placements < 1:
        raise MMJaxError(f"easy-VQA placements is {placements}; it has to be at least 1")


def _record(
    source: EasyVQASource | EasyVQACaptions, index: int, text: str, answer: str, meta: dict
) -> Record:
    """Return a question with its picture: as it is, with its shape at another place, or told."""
    image, images = meta["image_id"], ()
    if source.told:
        text = f"{_captions(source.split)[image]}\n{text}"
    else:
        path = _read(source.split)[3][image]
        moved = source.placements > 1
        images = (
            (move_shape(path, np.random.default_rng((source.seed, index))) if moved else path),
        )
    return Record((Message("user", text), Message("assistant", answer)), images, meta)


@functools.lru_cache(maxsize=2)
def _captions(split: str) -> dict[int, str]:
    """Return image -> caption of the pictures whose colour and shape open questions tell."""
    told: dict[int, dict[str, str]] = {}
    for text, answer, image in zip(*_read(split)[:3], strict=True):
        if question_kind(answer) == "yes/no":
            continue
        # "what color is the circle?" tells the shape by itself.
        for word in (answer, *text.rstrip("?").split()):
            if word in ANSWERS:
                told.setdefault(image, {})[question_kind(word)] = word
    return {
        image: f"a {words['color']} {words['shape']}"
        for image, words in sorted(told.items())
        if len(words) == 2
    }


@functools.lru_cache(maxsize=2)
def _captioned(split: str) -> tuple[int, ...]:
    """Return the pictures of ``_captions`` in their order."""
    return tuple(_captions(split))


@functools.lru_cache(maxsize=16)
def _kept(
    split: str, groups: tuple[str, ...] | None, words: tuple[str, ...] | None, told: bool
) -> np.ndarray:
    """Return which lines of a split are such questions, once for each process.

    groups, words: as for ``EasyVQASource``. told: of pictures with a caption alone.
    """
    texts, answers, ids, _ = _read(split)
    captions = _captions(split)
    return np.array(
        [
            i
            for i, (text, answer, image) in enumerate(zip(texts, answers, ids, strict=True))
            if (not groups or question_kind(answer) in groups)
            and (words is None or not set(words).isdisjoint(text.rstrip("?").split()))
            and (not told or image in captions)
        ]
    )


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
