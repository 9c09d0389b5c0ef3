"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): free answers, which GPT-4 judges."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mmjax.data.benchmarks.files import field, need_path, need_pictures, read_json
from mmjax.types import Message, MMJaxError, Record

_WHAT = "MM-Vet's folder, with mm-vet.json and images"


class MmVetSource:
    """MM-Vet's questions, asked and not scored.

    path: the folder of ``mm-vet.json``, id -> {imagename, question, capability}, and ``images``.
    meta: ``unscored``: a right answer is a matter of opinion, for which the publisher asks GPT-4.
        ``group`` (the capabilities, such as "ocr, math"). Raises MMJaxError for missing fields and
        pictures.
    """

    def __init__(self, path: str | os.PathLike):
        folder = need_path(path, _WHAT)
        self.path = os.fspath(Path(folder) / "mm-vet.json")
        found = read_json(self.path, _WHAT)
        if not isinstance(found, Mapping) or not found:
            raise MMJaxError(
                f"{self.path}: holds no object of questions by their ids; give {_WHAT}"
            )
        self._rows, names = [], []
        for key, question in found.items():
            where = f"{self.path}: question {key}"
            if not isinstance(question, Mapping):
                raise MMJaxError(f"{where}: is a {type(question).__name__}; give {_WHAT}")
            names.append((field(question, "imagename", where), where))
            skills = ", ".join(map(str, question.get("capability") or ()))
            self._rows.append((key, field(question, "question", where), skills))
        self._pictures = need_pictures(Path(folder) / "images", names, _WHAT)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        key, text, skills = self._rows[index]
        meta = {"id": key, "source": self.path, "line": index, "unscored": True}
        meta |= {"group": skills} if skills else {}
        return Record((Message("user", text),), (self._pictures[index],), meta)
