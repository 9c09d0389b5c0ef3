"""Random access to the values of one large JSON object, ``{id: value, ...}``, by id or by place.

The file is read whole once, while its index is built (``index_cache``); after that a value is read
from its bytes when it is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.index_cache import Arrays, IdIndex, as_bytes, cached_index
from mmjax.data.jsonl import first_byte, need_file, open_again, skip_space
from mmjax.types import BadSample, MMJaxError

Gather = Callable[[list[str], list[Any]], Arrays]


class KeyedJson:
    """The members of a JSON object in file order: ``len(f)``, ``f[i] -> (line, id, value)``.

    inside: the member that holds the object (``"data"``); None for the whole file. gather: makes
    further arrays of all ids and values while the index is built, found in ``arrays``. ``ids``
    finds the place of an id. Raises MMJaxError for a missing or broken file (naming the line), an
    object that is not there, and ids that are given twice.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        inside: str | None = None,
        gather: Gather | None = None,
        index_dir: str | os.PathLike | None = None,
    ):
        self.path = Path(path)
        need_file(self.path)
        what = f"members of {inside} with {getattr(gather, '__name__', None)}"
        self.arrays = cached_index(
            self.path, [self.path], what, lambda: index_object(self.path, inside, gather), index_dir
        )
        self.ids = IdIndex(self.arrays.pop("ids"), self.arrays.pop("order"))
        self._rows = self.arrays.pop("rows")
        self._fd: int | None = None
        if twice := self.ids.twice():
            shown = ", ".join(map(repr, twice[:3])) + (", ..." if len(twice) > 3 else "")
            raise MMJaxError(
                f"{self.path}: {len(twice)} ids are given more than once: {shown}; give each entry "
                "an id of its own, or remove the repetitions"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> tuple[int, str, Any]:
        start, end, line = (int(x) for x in self._rows[i])
        if self._fd is None:
            self._fd = open_again(self.path)
        try:
            raw = os.pread(self._fd, end - start, start)
            ((key, value),) = json.loads(b"{" + raw + b"}").items()
        except (OSError, ValueError, RecursionError) as e:
            meta = {"id": str(line), "source": str(self.path), "line": line}
            says = f"{self.path}:{line}: cannot be read as JSON: {e}"
            raise BadSample("bad_json", says, meta) from e
        return line, key, value

    def __getstate__(self):
        return {**self.__dict__, "_fd": None}

    def __del__(self, close=os.close):  # at a program's end modules and builtins may be gone
        if (fd := self.__dict__.get("_fd")) is not None:
            close(fd)


def index_object(path: Path, inside: str | None = None, gather: Gather | None = None) -> Arrays:
    """Find the members of an object: rows int64[n,3] (first byte, end byte, line), ids and order.

    Raises MMJaxError with line and column if the file is broken or holds no such object.
    """
    # latin-1 maps bytes to characters one to one, so character offsets are byte offsets.
    text = path.read_bytes().decode("latin-1")
    position = skip_space(text, first_byte(text))
    ids: list[str] = []
    values: list[Any] = []
    rows: list[tuple[int, int, int]] = []
    if inside is not None:
        others = []
        for key, _, end, _ in _members(path, text, position, stop=inside):
            others.append(key)
            if key == inside:
                position = end
                break
        else:
            raise MMJaxError(
                f"{path}: there is no member {inside!r} (found {', '.join(others[:5]) or 'none'}); "
                f'expected {{"{inside}": {{id: entry, ...}}}}'
            )
    line, counted = 1, 0
    for key, start, end, value in _members(path, text, position):
        line, counted = line + text.count("\n", counted, start), start
        rows.append((start, end, line))
        ids.append(key)
        if gather is not None:
            values.append(value)
    if inside is None and rows:
        after = skip_space(text, text.index("}", rows[-1][1]) + 1)
        if after != len(text):
            line = text.count("\n", 0, after) + 1
            raise MMJaxError(
                f"{path}:{line}: {text[after : after + 20]!r} stands behind the object, and a file "
                "holds one; join them into one"
            )
    index = IdIndex(as_bytes(ids))
    made = {"ids": index.names, "order": index.order}
    made["rows"] = np.array(rows, np.int64).reshape(-1, 3)
    return made | (gather(ids, values) if gather is not None else {})


def _members(
    path: Path, text: str, position: int, stop: str | None = None
) -> Iterator[tuple[str, int, int, Any]]:
    """Yield (key, first byte, end byte, value) of the object that begins at ``position``.

    The value of the member ``stop`` is not read: the end byte is where it begins, and the last.
    """
    decoder = json.JSONDecoder()

    def fail(at: int, problem: str) -> MMJaxError:
        line = text.count("\n", 0, at) + 1
        column = at - text.rfind("\n", 0, at)
        return MMJaxError(f"{path}:{line}: {problem} at column {column}: {text[at : at + 20]!r}")

    if text[position : position + 1] != "{":
        raise fail(position, "expected an object of entries by id, found something else")
    position = skip_space(text, position + 1)
    while text[position : position + 1] != "}":
        start = position
        if text[start : start + 1] != '"':
            raise fail(start, "expected an id in quotes (is the file cut off?)")
        try:
            _, quoted = decoder.raw_decode(text, start)
            colon = skip_space(text, quoted)
            if text[colon : colon + 1] != ":":
                raise fail(colon, "expected ':' behind an id")
            begin = skip_space(text, colon + 1)
            if stop is not None and json.loads(text[start:quoted].encode("latin-1")) == stop:
                yield stop, start, begin, None
                return
            value, end = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as e:
            raise fail(e.pos, f"not JSON ({e.msg})") from e
        except (ValueError, RecursionError) as e:  # thousands of digits, deep nesting
            raise fail(start, f"not JSON ({e})") from e
        raw = text[start:end]
        if raw.isascii():
            key = decoder.raw_decode(raw)[0]
        else:
            try:
                ((key, value),) = json.loads(f"{{{raw}}}".encode("latin-1")).items()
            except UnicodeDecodeError as e:
                if not text[start:quoted].isascii():
                    raise fail(start, f"an id or its entry is not UTF-8 ({e})") from e
                # The entry alone: a bad sample when it is read.
                key, value = decoder.raw_decode(text, start)[0], None
        yield key, start, end, value
        position = skip_space(text, end)
        if text[position : position + 1] == ",":
            position = skip_space(text, position + 1)
        elif text[position : position + 1] != "}":
            raise fail(position, "expected ',' or '}' behind an entry")
