"""easy-VQA: questions about one coloured shape on a 64x64 picture; needs ``pip install easy-vqa``.

4,000 training pictures with 38,575 questions, 1,000 test pictures with 9,673; thirteen answers.
"""

from __future__ import annotations

import functools
import os

from mmjax.types import Message, MMJaxError, Record

ANSWERS = (
    *("circle", "green", "red", "gray", "yes", "teal", "black", "rectangle"),
    *("yellow", "triangle", "brown", "blue", "no"),
)
SHAPES = ("circle", "rectangle", "triangle")
SPLITS = ("train", "test")


class EasyVQASource:
    """The questions of one split, in the package's order; images are file paths.

    meta: ``answers`` (one), ``group`` (``yes/no``, ``color`` or ``shape``, told from the answer),
    ``image_id``. Raises MMJaxError when the package is not installed or the split is unknown.
    """

    def __init__(self, split: str):
        if split not in SPLITS:
            raise MMJaxError(f"easy-VQA has no split {split!r}; it has {', '.join(SPLITS)}")
        self.split = split
        self._load()

    def __len__(self) -> int:
        return len(self._load()[0])

    def __getitem__(self, index: int) -> Record:
        texts, answers, ids, paths = self._load()
        answer, image = answers[index], ids[index]
        meta = {
            "id": f"{self.split}/{index}",
            "source": f"easy-vqa/{self.split}",
            "line": index,
            "answers": [answer],
            "group": question_kind(answer),
            "image_id": image,
        }
        messages = (Message("user", texts[index]), Message("assistant", answer))
        return Record(messages, (paths[image],), meta)

    def _load(self):
        return _read(self.split)


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
