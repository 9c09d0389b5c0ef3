"""Hateful Memes (Kiela et al. 2020, arXiv 2005.04790): is a picture with a text on it hateful?"""

from __future__ import annotations

import os

from mmjax.data.benchmarks.files import field, need_pictures, read_lines
from mmjax.types import Message, MMJaxError, Record

_WHAT = "Hateful Memes' dev_seen.jsonl, or another of its splits"
_PICTURES = "the folder that holds its img/"


class HatefulMemesSource:
    """Hateful Memes' pictures; the question is the text that is written on one.

    path: JSON lines ``{"id", "img": "img/<name>", "text", "label": 0 or 1}``; a test split has no
        labels. images: the folder of ``img``.
    meta: ``answers``: yes or no (or ``unscored``). Raises MMJaxError for missing fields and
        pictures, and labels that are neither 0 nor 1.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike):
        self.path = os.fspath(path)
        self._rows, names = [], []
        for where, row in read_lines(path, _WHAT):
            label = row.get("label")
            if label not in (None, 0, 1):
                raise MMJaxError(f"{where}: the label is {label!r}, neither 0 nor 1; give {_WHAT}")
            names.append((field(row, "img", where), where))
            key = str(field(row, "id", where, (str, int)))
            self._rows.append((key, field(row, "text", where), label))
        self._pictures = need_pictures(images, names, _PICTURES)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        key, text, label = self._rows[index]
        meta = {"id": key, "source": self.path, "line": index + 1}
        meta |= {"unscored": True} if label is None else {"answers": ["yes" if label else "no"]}
        return Record((Message("user", text),), (self._pictures[index],), meta)
