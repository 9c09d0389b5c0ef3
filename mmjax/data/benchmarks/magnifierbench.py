"""MagnifierBench (Li et al. 2023, arXiv 2311.04219): small things in large pictures."""

from __future__ import annotations

import os
import re

from mmjax.data.benchmarks.tables import Table, text_of
from mmjax.types import Message, MMJaxError, Record

_OPTIONS = re.compile(
    r"\bA[.)]\s*(.+?)[,;\s]*\bB[.)]\s*(.+?)[,;\s]*\bC[.)]\s*(.+?)[,;\s]*\bD[.)]\s*(.+?)[.\s]*$",
    re.DOTALL,
)


class MagnifierBenchSource:
    """MagnifierBench's questions with four options.

    path: the hub's parquet files (Otter-AI/MagnifierBench) with ``id``, ``instruction`` (the
        question and ``A. ..., B. ..., C. ..., D. ...``), ``answer`` (a letter) and ``images``, of
        which there is one.
    meta: ``answers``, ``choices`` where the options can be told apart. Raises MMJaxError for
        missing columns and an answer that is no letter from A to D.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._table = Table(path, "images", ("id", "instruction", "answer"))
        self._rows = []
        for where, row in self._table.rows:
            found = re.match(r"\W*([A-D])(?![A-Za-z])", text_of(row, "answer", where))
            if not found:
                raise MMJaxError(
                    f"{where}: the answer is {row['answer']!r}; expected a letter from A to D"
                )
            asked = text_of(row, "instruction", where)
            options = _OPTIONS.search(asked)
            choices = [text.strip() for text in options.groups()] if options else []
            self._rows.append((str(row["id"]), asked, found[1], choices))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        name, asked, letter, choices = self._rows[index]
        answer = f"({letter})" if letter in choices else letter
        meta = {"id": name, "source": self.path, "line": index, "answers": [answer]}
        meta |= {"choices": choices} if choices else {}
        return Record((Message("user", asked),), (self._table.picture(index),), meta)
