"""POPE (Li et al. 2023, arXiv 2305.10355): is an object in the picture?"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mmjax.data.benchmarks.files import field, files_of, need_pictures, read_lines, unique
from mmjax.types import Message, MMJaxError, Record

CATEGORIES = ("random", "popular", "adversarial")
"""How the absent objects were chosen: at random, among frequent ones, among those that often
stand together with what is there."""

_FILES = "POPE's coco_pope_{random,popular,adversarial}.json (github.com/AoiDragon/POPE)"
_PICTURES = "the folder of COCO's val2014"


class PopeSource:
    """POPE's questions, each answered ``yes`` or ``no``.

    path: one of its files, one object a line with ``question_id``, ``image``, ``text`` and
        ``label``, or a folder with all of them. A question's category is its field ``category``, or
        else the end of the file's name.
    images: the folder that the names of pictures are relative to.
    meta: ``answers``, ``group`` (the category). Raises MMJaxError for missing fields and pictures,
        unknown labels and categories, and ids given twice within a category.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike):
        rows = [
            (where, row, file)
            for file in files_of(path, "*pope*.json*", _FILES)
            for where, row in read_lines(file, _FILES)
        ]
        named = [(field(row, "image", where), where) for where, row, _ in rows]
        self._records = []
        for (where, row, file), picture in zip(
            rows, need_pictures(images, named, _PICTURES), strict=True
        ):
            category, label = _category(row, file, where), _label(row, where)
            meta = {
                "id": f"{category}/{field(row, 'question_id', where, (int, str))}",
                "source": str(file),
                "line": int(where.rpartition(":")[2]),
                "answers": [label],
                "group": category,
            }
            question = Message("user", field(row, "text", where))
            self._records.append(Record((question,), (picture,), meta))
        unique(
            [(r.meta["id"], f"{r.meta['source']}:{r.meta['line']}") for r in self._records],
            "question",
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


def _category(row: dict, file: Path, where: str) -> str:
    found = re.search(r"pope_([a-z]+)", file.name)
    category = row.get("category", found and found[1])
    if category not in CATEGORIES:
        raise MMJaxError(
            f"{where}: the category is {category!r}, none of {', '.join(CATEGORIES)}; give it as a "
            "field 'category', or in the file's name: coco_pope_random.json"
        )
    return category


def _label(row: dict, where: str) -> str:
    if "label" not in row:
        raise MMJaxError(
            f"{where}: has no field 'label' (it has {', '.join(row)}); a question file of LLaVA or "
            f"Bunny leaves it out: give {_FILES}"
        )
    if row["label"] not in ("yes", "no"):
        raise MMJaxError(f"{where}: the label is {row['label']!r}; expected 'yes' or 'no'")
    return row["label"]
