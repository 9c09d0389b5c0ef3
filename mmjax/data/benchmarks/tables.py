"""Benchmarks as the Hugging Face hub has them: parquet, pictures in a column."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.data.parquet_files import ParquetFiles
from mmjax.types import MMJaxError


class Table:
    """The rows of parquet files: small columns read whole, those of pictures when asked for.

    picture: the column of the picture, or the columns of several. ``rows[i]`` is (``file:row``,
    column -> value). Raises MMJaxError for missing columns.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        picture: str | Sequence[str],
        needed: Sequence[str],
        more: Sequence[str] = (),
    ):
        self._files = ParquetFiles(path)
        self._columns = [picture] if isinstance(picture, str) else list(picture)
        there = self._files.columns
        absent = [name for name in (*self._columns, *needed) if name not in there]
        if absent:
            raise MMJaxError(
                f"{path}: has no column {', '.join(absent)} (it has {', '.join(there)}); give the "
                "files as their publishers have them"
            )
        self._files.check_groups(self._columns)
        names = [*needed, *(name for name in more if name in there)]
        columns = [self._files.column(name) for name in names]
        self.rows = [
            (f"{path}:{i}", dict(zip(names, values, strict=True)))
            for i, values in enumerate(zip(*columns, strict=True))
        ]

    def picture(self, row: int) -> bytes:
        """Return the encoded picture of a row; empty where there is none, which no model can read.

        The question then still counts, as a wrong one of its group.
        """
        return self.pictures(row)[0]

    def forget(self) -> None:
        """Let go of the pictures of rows beside those that were asked for."""
        self._files.forget()

    def pictures(self, row: int) -> list[bytes]:
        """Return the encoded picture of each column, empty where there is none."""
        _, values = self._files.read(row, self._columns)
        return [_encoded(values[name]) for name in self._columns]


def _encoded(found: Any) -> bytes:
    """Return the bytes of a column's value, a struct or a list of one."""
    found = found if isinstance(found, list) else [found]
    data = [one.get("bytes") if isinstance(one, Mapping) else one for one in found]
    return data[0] if len(data) == 1 and isinstance(data[0], bytes) else b""


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a text column of a row; raises MMJaxError where it is empty or no text."""
    if not isinstance(row[name], str) or not row[name].strip():
        raise MMJaxError(f"{where}: column {name!r} is {row[name]!r}; expected text")
    return row[name]
