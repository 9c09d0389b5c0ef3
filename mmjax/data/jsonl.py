"""Random access to the records of a JSON array or a JSONL file through a byte-offset index.

Only the index (three integers a record) is held in memory; a record is read when it is asked for.
The index is cached beside the file, or in ``index_dir``, and made anew when the file's size or
modification time changes. A JSONL file is scanned in chunks; a ``.json`` array is read whole once,
when its index is built, and never again.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.index_cache import cached_index
from mmjax.types import BadSample, MMJaxError

_CHUNK = 1 << 24
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"  # a UTF-8 byte order mark
_OPENINGS = 8  # lines of which one at least begins with {, or the file is no JSONL


class IndexedJson:
    """The objects of one file: ``len(f)``, ``f[i] -> (line, dict)``; picklable, thread-safe.

    path: ``.jsonl`` / ``.ndjson`` (one object a line) or ``.json`` (one array of objects).
    Raises MMJaxError for a missing file, and, naming line and column, for a malformed ``.json``;
    a malformed line of a JSONL file is a BadSample when that line is read.
    """

    def __init__(self, path: str | os.PathLike, index_dir: str | os.PathLike | None = None):
        self.path = Path(path)
        need_file(self.path)
        self._stamp = _stamp(self.path)
        self._index = load_index(self.path, index_dir)
        # An array is often written as one long line, which then names none of its records.
        self._numbered = bool((np.diff(self._index[:, 2]) == 0).any())
        self._fd: int | None = None

    def __len__(self) -> int:
        return len(self._index)

    def line(self, i: int) -> int:
        """Return the line that a record begins on."""
        return int(self._index[i, 2])

    def name(self, i: int) -> str:
        """Name a record within its file: its line, or where records share lines its number."""
        return str(i + 1 if self._numbered else self.line(i))

    def where(self, i: int) -> str:
        """Say where a record stands, for a message."""
        number = f" (record {i + 1})" if self._numbered else ""
        return f"{self.path}:{self.line(i)}{number}"

    def __getitem__(self, i: int) -> tuple[int, dict[str, Any]]:
        try:
            return self._read(i)
        except BadSample as e:
            if _stamp(self.path) == self._stamp:
                raise
            # Its records stand elsewhere now; each of them would be taken for a broken one.
            says = f"{e}; the file has changed since it was opened: start again with the new one"
            raise BadSample(e.reason, says) from e

    def _read(self, i: int) -> tuple[int, dict[str, Any]]:
        start, end, line = (int(x) for x in self._index[i])
        if self._fd is None:
            self._fd = open_again(self.path)
        where = self.where(i)
        try:
            raw = os.pread(self._fd, end - start, start)
        except OSError as e:
            says = f"{where}: cannot be read: {e.strerror}; its disk or mount is failing"
            raise BadSample("bad_record", says) from e
        try:
            value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_reject_duplicates)
        except UnicodeDecodeError as e:
            raise BadSample(
                "bad_json", f"{where}: not UTF-8 at byte {e.start} of the record"
            ) from e
        except json.JSONDecodeError as e:
            raise BadSample(
                "bad_json", f"{where}: not JSON at column {e.colno} of the record ({e.msg})"
            ) from e
        except KeyError as e:
            raise BadSample("bad_json", f"{where}: field {e.args[0]!r} is given twice") from e
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, deep nesting
            raise BadSample("bad_json", f"{where}: cannot be read as JSON: {e}") from e
        if not isinstance(value, dict):
            raise BadSample(
                "bad_json", f"{where}: expected one JSON object, got {type(value).__name__}"
            )
        return line, value

    def __getstate__(self):
        return {**self.__dict__, "_fd": None}

    def __del__(self, close=os.close):  # at a program's end modules and builtins may be gone
        if (fd := self.__dict__.get("_fd")) is not None:
            close(fd)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what tells a file's versions apart, None where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def need_file(path: Path) -> None:
    """Raise MMJaxError where a data source is no file."""
    if not path.is_file():
        found = "is a folder; name the file in it" if path.is_dir() else "no such file"
        if not path.is_absolute():
            found += f" (looked for from {Path.cwd()})"
        raise MMJaxError(f"{path}: {found}; check the path of this data source")


def open_again(path: Path) -> int:
    """Open a data file whose index was read before; a data worker does so when it starts.

    Raises MMJaxError where it is not there any more: each of its records would be skipped for it.
    """
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as e:
        raise MMJaxError(
            f"{path}: cannot be opened any more: {e.strerror}; it was there when the run began. "
            "Put it back, or mend its mount, and start again: the run goes on from its checkpoint"
        ) from e


def load_index(path: Path, index_dir: str | os.PathLike | None = None) -> np.ndarray:
    """Return int64[n,3] (first byte, end byte, line) of each record, from the cache if it holds."""

    def build() -> dict[str, np.ndarray]:
        return {"index": index_array(path) if path.suffix.lower() == ".json" else index_lines(path)}

    return cached_index(path, [path], "records", build, index_dir)["index"]


def index_lines(path: Path) -> np.ndarray:
    """Find the lines of a JSONL file in chunks; blank lines hold no record.

    Raises MMJaxError for a file whose lines are no objects from the first on.
    """
    ends: list[np.ndarray] = []
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + size)
            size += len(chunk)
        end = np.concatenate([*ends, [size]]).astype(np.int64)
        start = np.concatenate([[0], end[:-1] + 1])
        line = np.arange(1, len(end) + 1)
        # Only the short lines can be blank; looking at them costs nothing.
        blank = end <= start
        for i in np.flatnonzero((end - start <= 8) & ~blank):
            file.seek(start[i])
            blank[i] = not file.read(end[i] - start[i]).strip()
        rows = np.stack([start, end, line], 1)[~blank]
        openings = []
        for begin, stop, _ in rows[:_OPENINGS]:
            file.seek(begin)
            openings.append(file.read(min(40, stop - begin)).removeprefix(_BOM).strip())
    if len(openings) > 1 and openings[0].startswith(b"["):
        raise MMJaxError(f"{path}: holds a JSON array; name it .json, or write one object a line")
    if openings and not any(opening.startswith((b"{", b"[")) for opening in openings):
        raise MMJaxError(
            f"{path}: begins with {openings[0]!r}; a JSON source is a .jsonl file in UTF-8, "
            "one object {...} a line, not compressed, or a .json file with an array of them"
        )
    return rows


def index_array(path: Path) -> np.ndarray:
    """Find the objects of a JSON array; raises MMJaxError with line and column if it is broken."""
    # latin-1 maps bytes to characters one to one, so that character offsets are byte offsets;
    # JSON's structure is ASCII, and every record is decoded as UTF-8 when it is read.
    text = path.read_bytes().decode("latin-1")
    position = skip_space(text, first_byte(text))
    if position == len(text):
        raise MMJaxError(f"{path}: the file is empty; expected a JSON array of records")
    if text[position : position + 1] != "[":
        seen = text[position : position + 20]
        raise MMJaxError(
            f"{path}:1: expected a JSON array of records in UTF-8, found {seen!r}; for one object "
            "a line, name the file .jsonl; instructions of MIMIC-IT are of kind 'mimicit'"
        )
    decoder = json.JSONDecoder()
    rows: list[tuple[int, int, int]] = []
    line, counted = 1, 0
    position = skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as e:
            raise MMJaxError(f"{path}:{e.lineno}: not JSON at column {e.colno}: {e.msg}") from e
        except (ValueError, RecursionError) as e:
            line += text.count("\n", counted, position)
            raise MMJaxError(
                f"{path}:{line}: record {len(rows) + 1} cannot be read as JSON: {e}"
            ) from e
        line, counted = line + text.count("\n", counted, position), position
        rows.append((position, end, line))
        position = skip_space(text, end)
        if text[position : position + 1] == ",":
            position = skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise MMJaxError(
                f"{path}:{line}: expected ',' or ']' after record {len(rows)}, found "
                f"{text[position : position + 20]!r} (is the file cut off?)"
            )
    after = skip_space(text, position + 1)
    if after != len(text):
        line += text.count("\n", counted, after)
        raise MMJaxError(
            f"{path}:{line}: {text[after : after + 20]!r} stands behind the array, and a file "
            "holds one; join them into one array, or write one object a line into a .jsonl file"
        )
    return np.array(rows, np.int64).reshape(-1, 3)


def first_byte(text: str) -> int:
    """Return where a file that was read as latin-1 begins, behind a byte order mark."""
    return len(_BOM) if text.startswith(_BOM.decode("latin-1")) else 0


def skip_space(text: str, position: int) -> int:
    """Return the place of the next character that is no JSON white space."""
    return _SPACE.match(text, position).end()


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing a key given twice (json would keep the last without a word)."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result
