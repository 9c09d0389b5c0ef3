"""What rows of parquet files are like without their pictures, a row group at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.data.parquet_files import ParquetFiles
from mmjax.types import BadSample

PICTURES = ("image", "images")
"""Parts that are pictures."""

PICTURE = b"-"
"""What stands for each picture that was not read."""


def read_outlines(
    files: ParquetFiles, row: int, fields: Mapping[str, str]
) -> tuple[int, list[dict[str, Any] | BadSample]]:
    """Return the first row of the group that holds a row, and each row's values, part -> value.

    fields: part -> column. The bytes of pictures are not read where something smaller tells how
    many there are: the paths beside them, or the file's own statistics of what is null.
    """
    first, metadata = files.group_of(row)
    told: dict[str, bool] = {}  # parts that each row of the group has, or none of them
    columns: dict[str, str] = {}
    for part, column in fields.items():
        found = _lightest(metadata, column) if part in PICTURES else column
        if isinstance(found, bool):
            told[part] = found
        else:
            columns[part] = found
    table = files.read_group(row, tuple(columns.values()))
    rows: list[dict[str, Any] | BadSample] = []
    for i in range(metadata.num_rows):
        try:
            value = {part: table.column(fields[part])[i].as_py() for part in columns}
        except UnicodeDecodeError as e:
            rows.append(BadSample("bad_record", f"{files.path}:{first + i}: is not UTF-8 ({e})"))
            continue
        value |= {part: PICTURE if there else None for part, there in told.items()}
        for part in PICTURES:
            if (pictures := value.get(part)) is not None:
                count = len(pictures) if isinstance(pictures, list) else 1
                value[part] = [PICTURE] * count
        rows.append(value)
    return first, rows


def _lightest(metadata: Any, column: str) -> str | bool:
    """Return what to read of a group to count a column's pictures; a bool where all rows agree."""
    every = (metadata.column(i) for i in range(metadata.num_columns))
    parts = [part for part in every if part.path_in_schema.split(".")[0] == column]
    if not parts:  # a name with a dot in it
        return column
    one = min(parts, key=lambda part: part.total_uncompressed_size)
    statistics = one.statistics
    counted = statistics is not None and statistics.has_null_count
    nulls = statistics.null_count if counted else None
    if one.path_in_schema == column and nulls in (0, metadata.num_rows):  # no list, no struct
        return nulls == 0
    return one.path_in_schema
