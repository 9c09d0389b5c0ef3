"""The magnifier: read a handwritten digit of 8x8 pixels that hides in a real photograph.

Pictures are made as they are asked for, each a function of (seed, split, index): a random crop of
one of scikit-learn's two photographs with one of its 1,797 handwritten digits painted into it.
Training and test share neither digits nor the regions of the photographs they are cropped from.
Reading the digit needs the full resolution: halve the picture and the strokes melt.
"""

from __future__ import annotations

import functools
import gzip
import importlib.metadata
from pathlib import Path

import numpy as np
from PIL import Image

from mmjax.types import Message, MMJaxError, Record

SPLITS = {"train": 0, "test": 1, "test_mc": 2}
DIGIT = 8  # pixels on a side, as scikit-learn ships them
QUESTION = "Which digit is hidden in the picture?"
LETTERS = "ABCD"
_TEST_SHARE = 0.2  # of the digits
_TRAIN_WIDTH = 0.7  # of each photograph, from the left


class MagnifierSource:
    """Questions about hidden digits.

    split: ``train``, ``test`` (open question) or ``test_mc`` (the same test digits, four options,
    the answer is the option's letter). size: number of samples; by default 20,000 for training,
    and for a test split every test digit once. image_size: side of the square picture. align: the
    digit's corner falls on multiples of this; 8, with patches of 8 pixels, puts it into one patch,
    which a model of a few million parameters needs, 1 puts it anywhere. mc_share: how many of the
    training questions are multiple choice. meta: ``answers``, ``digit``, ``box`` (top, left,
    bottom, right), ``group`` (``open`` or ``mc``), and ``choices`` (the digits behind A to D).
    """

    def __init__(
        self,
        split: str,
        *,
        size: int | None = None,
        image_size: int = 96,
        align: int = 8,
        seed: int = 0,
        mc_share: float = 0.25,
    ):
        if split not in SPLITS:
            raise MMJaxError(f"the magnifier has no split {split!r}; it has {', '.join(SPLITS)}")
        if not DIGIT <= image_size <= 160 or align < 1:
            raise MMJaxError(
                f"image_size {image_size}, align {align}: the picture must be {DIGIT} to 160 "
                "pixels (what both regions of the photographs hold) and align at least 1"
            )
        self.split, self.image_size, self.align, self.seed = split, image_size, align, seed
        self.mc_share = mc_share
        self.size = size or (20_000 if split == "train" else len(_digits()[1]["test"]))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"magnifier {self.split}: index {index} of {self.size}")
        # test and test_mc show the same pictures, so that only the way of asking differs
        kind = "train" if self.split == "train" else "test"
        rng = np.random.default_rng((self.seed, SPLITS[kind], index))
        picture, digit, box = self._paint(rng, kind, index)
        choices = [(digit + 1 + int(step)) % 10 for step in rng.permutation(9)[:3]]
        place = int(rng.integers(4))
        choices.insert(place, digit)
        multiple = self.split == "test_mc" or (
            self.split == "train" and rng.random() < self.mc_share
        )
        question, answer = QUESTION, str(digit)
        meta = {
            "id": f"{self.split}/{index}",
            "source": f"magnifier/{self.split}",
            "line": index,
            "digit": digit,
            "box": box,
            "group": "mc" if multiple else "open",
        }
        if multiple:
            options = " ".join(f"{a}. {c}" for a, c in zip(LETTERS, choices, strict=True))
            question, answer = f"{QUESTION} {options}", LETTERS[place]
            meta["choices"] = [str(c) for c in choices]
        meta["answers"] = [answer]
        return Record((Message("user", question), Message("assistant", answer)), (picture,), meta)

    def _paint(self, rng: np.random.Generator, kind: str, index: int):
        """Crop a photograph and paint a digit in; returns (uint8[h,w,3], digit, box)."""
        images, rows, labels = _digits()
        if kind == "train":
            row = rows[kind][rng.integers(len(rows[kind]))]
        else:
            row = rows[kind][index % len(rows[kind])]
        photos = _photographs()[kind]
        photo = photos[rng.integers(len(photos))]
        side = self.image_size
        y = rng.integers(photo.shape[0] - side + 1)
        x = rng.integers(photo.shape[1] - side + 1)
        picture = photo[y : y + side, x : x + side].copy()
        cells = (side - DIGIT) // self.align + 1
        top, left = (int(v) * self.align for v in rng.integers(cells, size=2))
        picture[top : top + DIGIT, left : left + DIGIT] = images[row]
        return picture, int(labels[row]), (top, left, top + DIGIT, left + DIGIT)


@functools.lru_cache(maxsize=1)
def _digits():
    """Load the digits once a process: (uint8[n,8,8,1], rows of each split, labels[n])."""
    with gzip.open(_file("digits.csv.gz")) as file:
        table = np.loadtxt(file, delimiter=",")
    levels, labels = table[:, :-1].reshape(-1, DIGIT, DIGIT), table[:, -1].astype(int)
    images = np.round(levels * (255 / 16)).astype(np.uint8)[..., None]  # white on black
    # The division is fixed: whatever seed a run has, it never trains on a test digit.
    order = np.random.default_rng(0).permutation(len(images))
    held_out = round(_TEST_SHARE * len(images))
    return images, {"test": order[:held_out], "train": order[held_out:]}, labels


@functools.lru_cache(maxsize=1)
def _photographs() -> dict[str, list[np.ndarray]]:
    """Load both photographs once a process, divided into a training and a test region."""
    photos = [np.asarray(Image.open(_file(f"{name}.jpg"))) for name in ("china", "flower")]
    cuts = [round(_TRAIN_WIDTH * p.shape[1]) for p in photos]
    return {
        "train": [p[:, :c] for p, c in zip(photos, cuts, strict=True)],
        "test": [p[:, c:] for p, c in zip(photos, cuts, strict=True)],
    }


def _file(name: str) -> Path:
    """Find a data file of scikit-learn. Importing that would delay a run and its workers.

    Raises MMJaxError without the package.
    """
    try:
        files = importlib.metadata.files("scikit-learn") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(file.locate())
    raise MMJaxError(
        f"the magnifier's {name} comes with scikit-learn: pip install 'mmjax[recipes]'"
    )
