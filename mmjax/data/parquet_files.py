"""The rows of parquet files: read by row group, never whole.

A row group is what parquet can read at once. Written with few rows in each, a file gives random
access to its images; one group of many gigabytes does not, and is refused, with the command that
writes such a file anew (``mmjax.data.regroup_parquet``).
"""

from __future__ import annotations

import glob
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.types import BadSample, MMJaxError

MAX_GROUP_BYTES = 256 * 2**20
"""Bytes of a row group's columns above which a file is refused: so much is held to read one row."""

_KEPT_GROUPS = 2  # row groups a process keeps: neighbouring records often share one
_OPEN_FILES = 64  # a process may not hold as many files as a folder has


class ParquetFiles:
    """The rows of one parquet file, of all ``*.parquet`` of a folder, or of those a pattern names.

    Files stand in the order of their names. ``read(row, columns)`` gives one row as Python values.
    Raises MMJaxError for a missing or broken file, and for a row group too large to be read for the
    sake of one row.
    """

    def __init__(self, path: str | os.PathLike, columns: Sequence[str] | None = None):
        self.path = Path(path)
        if self.path.is_dir():
            self.files = sorted(self.path.rglob("*.parquet"))
            if not self.files:
                raise MMJaxError(f"{self.path}: this folder holds no file *.parquet")
        elif self.path.is_file():
            self.files = [self.path]
        else:
            pattern = os.fspath(self.path)
            found = map(Path, glob.glob(pattern, recursive=True))
            self.files = sorted(file for file in found if file.is_file())
            if not self.files:
                absent = "no such file or folder"
                if glob.has_magic(pattern):
                    absent = "no file matches this pattern"
                raise MMJaxError(f"{self.path}: {absent}; check the path of this source")
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._kept: OrderedDict[tuple[int, int, tuple[str, ...]], Any] = OrderedDict()
        self._lock = threading.Lock()
        groups = []  # (file, group, rows)
        for number, file in enumerate(self.files):
            found = self.file(number)
            if number and found.schema_arrow.names != self.columns:
                raise MMJaxError(
                    f"{file}: has the columns {found.schema_arrow.names}, and {self.files[0].name} "
                    f"has {self.columns}; put files of one kind into a folder"
                )
            self.columns = found.schema_arrow.names
            for g in range(found.metadata.num_row_groups):
                groups.append((number, g, found.metadata.row_group(g).num_rows))
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if columns is not None:
            self.check_groups(columns)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self):
        return {**self.__dict__, "_open": OrderedDict(), "_kept": OrderedDict(), "_lock": None}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._lock = threading.Lock()

    def file(self, number: int) -> Any:
        """Open a file in this process; handles do not travel to others, and the last few stay."""
        if number not in self._open:
            pq = pyarrow_parquet()
            try:
                found = pq.ParquetFile(self.files[number])
                _ = found.schema_arrow.names  # of a damaged file they are not UTF-8
                self._open[number] = found
            except Exception as e:  # pyarrow raises its own and Python's errors for broken files
                raise MMJaxError(
                    f"{self.files[number]}: cannot be read as parquet ({e}); is it cut off?"
                ) from e
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def check_groups(self, columns: Sequence[str]) -> None:
        """Raise MMJaxError when a row group of these columns is too large to hold."""
        for file, group, _ in self._groups:
            name = self.files[int(file)]
            meta = self.file(int(file)).metadata.row_group(int(group))
            parts = [meta.column(c) for c in range(meta.num_columns)]
            try:
                size = sum(
                    p.total_uncompressed_size
                    for p in parts
                    if p.path_in_schema.split(".")[0] in columns
                )
            except UnicodeDecodeError as e:
                raise MMJaxError(
                    f"{name}: row group {group} has a column whose name is not UTF-8 ({e}); the "
                    "file is damaged: fetch it again"
                ) from e
            if size > MAX_GROUP_BYTES:
                raise MMJaxError(
                    f"{name}: row group {group} holds {size / 2**20:.0f} MiB, and reading one row "
                    f"reads them all (limit {MAX_GROUP_BYTES // 2**20} MiB); write it anew with "
                    f"small groups: python -m mmjax.data.regroup_parquet {name} NEW.parquet"
                )

    def column(self, name: str) -> list[Any]:
        """Read one small column whole, group by group; raises MMJaxError for a damaged one."""
        values: list[Any] = []
        for file, group, _ in self._groups:
            try:
                values += self._read(int(file), int(group), (name,)).column(0).to_pylist()
            except BadSample as e:
                raise MMJaxError(f"{e}; fetch the file again") from e
            except UnicodeDecodeError as e:
                says = f"{self.files[int(file)]}: {name!r} is not UTF-8 ({e})"
                raise MMJaxError(f"{says}; write the file anew with text in UTF-8") from e
        return values

    def read(self, row: int, columns: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """Return (file:row, values) of one row."""
        file, group, first = self._place(row)
        inside = row - first
        with self._lock:
            table = self._group(file, group, tuple(columns))
        where, values = f"{self.files[file]}:{row}", {}
        for name in columns:
            try:
                values[name] = table.column(name)[inside].as_py()
            except UnicodeDecodeError as e:  # pyarrow looks at text when it is asked for
                raise BadSample("bad_record", f"{where}: {name!r} is not UTF-8 ({e})") from e
        return where, values

    def group_of(self, row: int) -> tuple[int, Any]:
        """Return the first row of the row group that holds a row, and what the file says of it."""
        file, group, first = self._place(row)
        with self._lock:
            return first, self.file(file).metadata.row_group(group)

    def read_group(self, row: int, columns: Sequence[str]) -> Any:
        """Read columns of the whole row group that holds a row; ``image.path`` is a part of one."""
        file, group, _ = self._place(row)
        with self._lock:
            return self._read(file, group, tuple(columns))

    def _place(self, row: int) -> tuple[int, int, int]:
        """Return a row's file, its row group in it, and the first row of that group."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        place = int(np.searchsorted(self._ends, row, side="right"))
        file, group, rows = (int(x) for x in self._groups[place])
        return file, group, int(self._ends[place]) - rows

    def forget(self) -> None:
        """Let go of the row groups that are kept for the rows beside those that were read."""
        with self._lock:
            self._kept.clear()

    def _group(self, file: int, group: int, columns: tuple[str, ...]) -> Any:
        """Read the columns of a row group, or take them from the few that are kept."""
        table = self._kept.get((file, group, columns))
        if table is None:
            table = self._read(file, group, columns)
            self._kept[file, group, columns] = table
            while len(self._kept) > _KEPT_GROUPS:
                self._kept.popitem(last=False)
        return table

    def _read(self, file: int, group: int, columns: tuple[str, ...]) -> Any:
        try:
            return self.file(file).read_row_group(group, columns=list(columns))
        except (OSError, ValueError) as e:
            says = " ".join(str(e).split())
            raise BadSample(
                "bad_record", f"{self.files[file]}: row group {group} cannot be read ({says})"
            ) from e


def pyarrow_parquet() -> Any:
    """Import pyarrow's reader and writer; raises MMJaxError where they are not installed."""
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise MMJaxError("parquet files need pyarrow: pip install 'mmjax[formats]'") from e
    return pq
