"""GQA (Hudson and Manning 2019, arXiv 1902.09506): one short answer to a question on a scene."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmjax.data.benchmarks.files import field, need_pictures, read_json
from mmjax.types import Message, MMJaxError, Record

_WHAT = "GQA's questions, such as testdev_balanced_questions.json"
_PICTURES = "the folder of GQA's images.zip"


class GqaSource:
    """GQA's questions.

    path: JSON, question id -> ``question``, ``imageId``, ``types`` and, but for test splits,
        ``answer``. Of a file with both, only balanced questions are taken: they alone count in
        GQA's accuracy. images: the folder of ``<imageId>.jpg``.
    meta: ``answers`` (or ``unscored``), ``group``: the structural type, of which ``query`` is open
        and verify, logical, choose and compare are binary. Raises MMJaxError for missing fields and
        pictures.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike):
        self.path = os.fspath(path)
        found = read_json(path, _WHAT)
        if not isinstance(found, Mapping) or not found:
            raise MMJaxError(f"{path}: holds no object of questions by their ids; give {_WHAT}")
        self._rows, names = [], []
        for key, question in found.items():
            where = f"{path}: question {key}"
            if not isinstance(question, Mapping):
                raise MMJaxError(f"{where}: is a {type(question).__name__}; give {_WHAT}")
            if question.get("isBalanced") is False:
                continue
            text = field(question, "question", where)
            names.append((field(question, "imageId", where) + ".jpg", where))
            answer = field(question, "answer", where) if "answer" in question else None
            kind = (question.get("types") or {}).get("structural")
            self._rows.append((key, text, answer, kind))
        self._pictures = need_pictures(images, names, _PICTURES)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        key, text, answer, kind = self._rows[index]
        meta: dict[str, Any] = {"id": key, "source": self.path, "line": index}
        meta |= {"unscored": True} if answer is None else {"answers": [answer]}
        meta |= {"group": kind} if kind else {}
        return Record((Message("user", text),), (self._pictures[index],), meta)
