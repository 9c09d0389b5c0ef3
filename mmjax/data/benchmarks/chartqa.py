"""ChartQA (Masry et al. 2022, arXiv 2203.10244): a number or a few words read off a chart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmjax.data.benchmarks.files import field, files_of, need_path, need_pictures, read_lines
from mmjax.data.benchmarks.tables import Table, text_of
from mmjax.types import Message, MMJaxError, Record

PARTS = ("human", "augmented")
_WHAT = (
    "a split's folder of ChartQA with <split>_human.json, <split>_augmented.json and png, or the "
    "hub's parquet files"
)


class ChartQaSource:
    """ChartQA's questions of one split.

    path: ``ChartQA Dataset/test``, with ``test_human.json`` and ``test_augmented.json``, lists of
        {imgname, query, label}, beside the pictures in ``png``; or lmms-lab/ChartQA's parquet
        files: ``question``, ``answer``, ``type`` and ``image``.
    meta: ``answers``, ``group``: human or augmented (written by a machine). Raises MMJaxError for
        missing fields and pictures.
    """

    def __init__(self, path: str | os.PathLike):
        path = need_path(path, _WHAT)
        self._table: Table | None = None
        self._rows: list[tuple[str, str, str, Any, str]] = []
        if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
            self._table = Table(path, "image", ("question", "answer", "type"))
            for i, (where, row) in enumerate(self._table.rows):
                asked, label = text_of(row, "question", where), text_of(row, "answer", where)
                self._rows.append(
                    (asked, label, _part(text_of(row, "type", where), where), i, where)
                )
            return
        for file in files_of(path, "*_*.json", _WHAT):
            part = _part(file.stem, str(file))
            rows = read_lines(file, _WHAT)
            names = [(field(row, "imgname", where), where) for where, row in rows]
            pictures = need_pictures(
                file.parent / "png", names, "the folder png beside the questions"
            )
            for (where, row), picture in zip(rows, pictures, strict=True):
                asked, label = field(row, "query", where), str(field(row, "label", where, _LABEL))
                self._rows.append((asked, label, part, picture, where))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        question, label, part, picture, where = self._rows[index]
        file, _, line = where.rpartition(":")
        meta = {"id": f"{Path(file).stem}/{line}", "source": file, "line": int(line)}
        meta |= {"answers": [label], "group": part}
        image = self._table.picture(picture) if self._table else picture
        return Record((Message("user", question),), (image,), meta)


_LABEL = (str, int, float)


def _part(name: str, where: str) -> str:
    part = next((one for one in PARTS if one in name), None)
    if part is None:
        raise MMJaxError(f"{where}: {name!r} names neither human nor augmented; give {_WHAT}")
    return part
