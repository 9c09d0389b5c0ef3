"""Parquet files as the hub has them: images by id, and rows as records."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from typing import Any

from mmjax.data.index_cache import Arrays, IdIndex, as_bytes, cached_index
from mmjax.data.parquet_files import ParquetFiles
from mmjax.data.parquet_outlines import read_outlines
from mmjax.data.skips import listed_as
from mmjax.data.sources import NOT_READ, image_folder, parse_record
from mmjax.data.splits import check_one_split
from mmjax.types import BadSample, MMJaxError, Record


class ParquetImages:
    """Images by id: the pandas index (or a column ``id``) and a column ``base64``.

    The ids are read once and kept in an index beside the files (see ``index_cache``). Both base64
    alphabets are read; a column of bytes is taken as it is. Raises MMJaxError for missing columns,
    and ids given twice.
    """

    def __init__(self, path: str | os.PathLike, index_dir: str | os.PathLike | None = None):
        self._files = ParquetFiles(path)
        self.path, names = self._files.path, self._files.columns
        self._column = "base64"
        id_column = _id_column(self._files)
        if id_column is None or self._column not in names:
            raise MMJaxError(
                f"{self.path}: has the columns {names}; image files need 'base64' and the ids as "
                "the pandas index (__index_level_0__) or as a column 'id'"
            )
        self._files.check_groups([self._column])

        def build() -> Arrays:
            index = IdIndex(as_bytes(map(str, self._files.column(id_column))))
            return {"ids": index.names, "order": index.order}

        what = f"ids of {id_column}"
        found = cached_index(self.path, self._files.files, what, build, index_dir)
        self.ids = IdIndex(found["ids"], found["order"])
        if twice := self.ids.twice():
            raise MMJaxError(
                f"{self.path}: {len(twice)} image ids are given more than once, first "
                f"{twice[0]!r}; keep one image for each id"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> bytes:
        where, values = self._files.read(place, [self._column])
        return decode_base64(values[self._column], where)


class ParquetSource:
    """Records of parquet files as datasets on the Hugging Face hub have them.

    path: a file, a folder of one split, or a pattern (``data/train-*.parquet``).
    fields: our name -> theirs, for columns called otherwise; None for one to pass over. Images are
    ``image`` or ``images``: bytes, structs {bytes, path}, or lists of these; a path is relative to
    image_root (default: the folder of the files). Texts are ``question`` with ``answer`` or
    ``answers``, or ``messages`` or ``conversations``: lists of structs, or JSON text.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fields: Mapping[str, str | None] | None = None,
        image_root: str | os.PathLike | None = None,
    ):
        self._files = ParquetFiles(path)
        self.path = self._files.path
        folder = self._files.files[0].parent
        if self.path.is_dir():
            folder = self.path
            check_one_split(folder, self._files.files)
        self.image_root = image_folder(image_root, folder)
        there = self._files.columns
        if not isinstance(fields or {}, Mapping):
            raise MMJaxError(
                f"{self.path}: fields is {fields!r}; give columns by what they hold, such as "
                "{'question': 'query'}"
            )
        fields = dict(fields or {})
        unknown = sorted(set(fields) - set(_COLUMNS))
        absent = sorted(set(fields.values()) - {None, *there})
        if unknown or absent:
            raise MMJaxError(
                f"{self.path}: fields {fields}: "
                + (f"{unknown} are none of {', '.join(_COLUMNS)}; " if unknown else "")
                + (f"there are no columns {absent}; " if absent else "")
                + f"the columns are {', '.join(there)}"
            )
        self.fields = {n: fields.get(n, n) for n in _COLUMNS if fields.get(n, n) in there}
        if not {"question", "messages", "conversations"} & set(self.fields):
            raise MMJaxError(
                f"{self.path}: none of the columns {', '.join(there)} is 'question', 'messages' or "
                "'conversations'; say which is with fields={'question': ...}"
            )
        unread = [c for c in NOT_READ if c in there and c not in self.fields.values()]
        if unread and not {"image", "images"} & {*self.fields, *fields}:
            raise MMJaxError(  # or it would be trained on blindly
                f"{self.path}: pictures are read from 'image' or 'images', and there is only the "
                f"column {unread[0]!r}; if it holds them, say fields={{'image': {unread[0]!r}}}, "
                "and to train without them fields={'image': None}"
            )
        self._files.check_groups(list(self.fields.values()))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        where, found = self._files.read(index, list(self.fields.values()))
        return self._made({name: found[column] for name, column in self.fields.items()}, where)

    def outlines(self, index: int) -> tuple[int, list[Record | BadSample]]:
        """Return the records of a record's row group, see ``Source``."""
        first, rows = read_outlines(self._files, index, self.fields)
        found: list[Record | BadSample] = []
        for row, value in enumerate(rows, first):
            try:
                if isinstance(value, BadSample):
                    raise value
                found.append(self._made(value, f"{self.path}:{row}"))
            except BadSample as error:
                found.append(error)
        return first, found

    def _made(self, value: dict[str, Any], where: str) -> Record:
        value = {k: v for k, v in value.items() if v is not None}
        name, _, row = where.rpartition(":")
        value.setdefault("id", row)
        with listed_as({"id": value["id"], "source": name, "line": int(row)}):
            return self._record(value, where)

    def _record(self, value: dict[str, Any], where: str) -> Record:
        images = [*_listed(value.pop("image", None)), *_listed(value.pop("images", None))]
        for form in ("messages", "conversations"):
            if isinstance(value.get(form), str):
                try:
                    value[form] = json.loads(value[form])
                except (ValueError, RecursionError) as e:
                    raise BadSample("bad_record", f"{where}: {form!r} is not JSON: {e}") from e
        encoded = tuple(self._image(image, where) for image in images)
        name, _, row = where.rpartition(":")
        return parse_record(value, name, int(row), self.image_root, encoded)

    def _image(self, image: Any, where: str) -> bytes | str:
        """Return the bytes of an image column's value, or the path it names."""
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image:
            return str(self.image_root / image)
        if not isinstance(image, bytes) or not image:
            raise BadSample(
                "missing_image", f"{where}: an image is {type(image).__name__}, not bytes or a path"
            )
        return image


_COLUMNS = (
    *("id", "image", "images", "question", "answer", "answers", "messages", "conversations"),
    *("choices", "group", "split"),
)


def decode_base64(text: str | bytes, where: str) -> bytes:
    """Decode base64 in either alphabet, padded or not; raises BadSample naming the place."""
    raw = text.encode("ascii", "replace") if isinstance(text, str) else bytes(text or b"")
    raw = raw.rsplit(b"base64,", 1)[-1].translate(_TO_STANDARD, b"\r\n \t=")
    try:
        data = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error as e:
        raise BadSample("corrupt_image", f"{where}: not base64 ({e})") from e
    if not data:
        raise BadSample("corrupt_image", f"{where}: the image is empty")
    return data


_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _id_column(files: ParquetFiles) -> str | None:
    """Find the column that holds the ids: pandas tells of its index in the file's metadata."""
    metadata = files.file(0).schema_arrow.metadata or {}
    if b"pandas" in metadata:
        try:
            index = json.loads(metadata[b"pandas"]).get("index_columns", [])
        except (ValueError, AttributeError) as e:
            raise MMJaxError(
                f"{files.files[0]}: what pandas wrote of its index is no JSON object ({e}); the "
                "file is damaged: fetch it again"
            ) from e
        if isinstance(index, list) and len(index) == 1 and index[0] in files.columns:
            return index[0]
    known = ("__index_level_0__", "id", "image_id")
    return next((name for name in known if name in files.columns), None)
