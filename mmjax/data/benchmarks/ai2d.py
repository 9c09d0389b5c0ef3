"""AI2D (Kembhavi et al. 2016, arXiv 1603.07396): school diagrams, four options a question."""

from __future__ import annotations

import os

from mmjax.data.benchmarks.tables import Table, text_of
from mmjax.types import Message, MMJaxError, Record

LETTERS = "ABCDEFGHIJ"


class Ai2dSource:
    """AI2D's questions of the test split.

    path: lmms-lab/ai2d's parquet files: ``question``, ``options`` (a list), ``answer`` (the number
        of the right one from 0) and ``image``.
    meta: ``answers`` (a letter), ``choices``. Raises MMJaxError for missing columns and an answer
        that is no option.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._table = Table(path, "image", ("question", "options", "answer"))
        self._rows = []
        for where, row in self._table.rows:
            choices = [str(one) for one in row["options"] or ()]
            number = str(row["answer"])
            if not number.isdigit() or not int(number) < len(choices) <= len(LETTERS):
                raise MMJaxError(
                    f"{where}: the answer is {row['answer']!r} of {len(choices)} options; expected "
                    f"a number from 0 to {len(choices) - 1}, and at most {len(LETTERS)} options"
                )
            self._rows.append((text_of(row, "question", where), choices, LETTERS[int(number)]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        question, choices, letter = self._rows[index]
        lines = (f"{a}. {c}" for a, c in zip(LETTERS, choices, strict=False))
        answer = f"({letter})" if letter in choices else letter
        meta = {"id": str(index), "source": self.path, "line": index}
        meta |= {"answers": [answer], "choices": choices}
        text = "\n".join([question, *lines])
        return Record((Message("user", text),), (self._table.picture(index),), meta)
