"""Records in ArrayRecord files: everything of a source, images included, with random access.

A record is ``MMR1``, the length of its header (uint32, little endian), the header (UTF-8 JSON:
``messages`` as [role, text], ``images`` as lengths in bytes, those of a video's frames in a list of
their own, ``meta``), and the encoded images one after another. docs/data_formats.md describes it
for other readers and writers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data.images import load_rgb
from mmjax.partial import new_folder, refuse_existing
from mmjax.types import BadSample, ImageSource, Message, MMJaxError, Record

MAGIC = b"MMR1"
SUFFIX = ".array_record"
_ROLES = ("system", "user", "assistant")


class ArrayRecordSource:
    """The records of an ArrayRecord file, or of all ``*.array_record`` in a folder by name.

    Raises MMJaxError for missing and broken files, and for files that hold no records of ours.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.is_dir():
            files = sorted(self.path.glob(f"*{SUFFIX}"))
        else:
            files = [self.path] if self.path.is_file() else []
        if not files:
            raise MMJaxError(
                f"{self.path}: no such file, and no folder with *{SUFFIX} in it; write one with "
                "python -m mmjax.data.to_array_record"
            )
        reader, _ = _array_record()
        try:
            self._data = reader([os.fspath(f) for f in files])
            first = self._data[0] if len(self._data) else MAGIC
        except (RuntimeError, ValueError, OSError, IndexError) as e:
            raise MMJaxError(
                f"{self.path}: cannot be read as ArrayRecord: {e}; write one with python -m "
                "mmjax.data.to_array_record, or name the kind that this file is of"
            ) from e
        if not first.startswith(MAGIC):
            raise MMJaxError(
                f"{files[0]}: its records do not begin with {MAGIC.decode()}, so they were not "
                "written by mmjax.data.to_array_record; use kind='tfds' for TFDS files"
            )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = f"{self.path}:{index}"
        try:
            raw = self._data[index]
        except (RuntimeError, ValueError, OSError) as e:
            raise BadSample("bad_record", f"{where}: cannot be read: {e}") from e
        return unpack_record(raw, where)


def pack_record(record: Record) -> bytes:
    """Write a record as bytes; files are read in, arrays and PIL images become PNG.

    Raises BadSample when an image file is missing, MMJaxError when meta is not JSON.
    """
    images: list[bytes] = []
    lengths: list[int | list[int]] = []
    for image in record.images:
        frames = [_encoded(one) for one in _frames(image)]
        images += frames
        sizes = [len(one) for one in frames]
        lengths.append(sizes if isinstance(image, list | tuple) else sizes[0])
    header = {
        "messages": [[m.role, m.text] for m in record.messages],
        "images": lengths,
        "meta": dict(record.meta),
    }
    try:
        # Half a surrogate pair becomes its own escape in JSON: a record is copied as it is.
        text = json.dumps(header, ensure_ascii=False, default=_plain)
        text = text.encode(errors="backslashreplace")
    except TypeError as e:
        raise MMJaxError(f"record {record.meta.get('id')}: its meta is not JSON: {e}") from e
    return b"".join([MAGIC, struct.pack("<I", len(text)), text, *images])


def unpack_record(raw: bytes, where: str) -> Record:
    """Read a record from its bytes; raises BadSample naming the place."""
    try:
        if raw[:4] != MAGIC:
            raise ValueError(f"begins with {raw[:4]!r} instead of {MAGIC!r}")
        (length,) = struct.unpack_from("<I", raw, 4)
        header = json.loads(raw[8 : 8 + length].decode())
        messages = tuple(Message(role, text) for role, text in header["messages"])
        meta = header.get("meta", {})
        if not isinstance(meta, dict) or not all(isinstance(m.text, str) for m in messages):
            raise ValueError("a message is no text, or meta is no object")
        if wrong := [m.role for m in messages if m.role not in _ROLES]:
            raise ValueError(f"unknown role {wrong[0]!r}")
        lengths = header["images"]
        ends = np.cumsum([8 + length, *(n for one in lengths for n in _frames(one))])
        if ends[-1] != len(raw):
            raise ValueError(f"holds {len(raw)} bytes, and its header says {ends[-1]}")
    except (ValueError, KeyError, TypeError, struct.error) as e:
        raise BadSample("bad_record", f"{where}: {e}") from e
    parts = (raw[a:b] for a, b in itertools.pairwise(ends))
    images = tuple(
        tuple(itertools.islice(parts, len(one))) if isinstance(one, list) else next(parts)
        for one in lengths
    )
    return Record(messages, images, meta)


def write_array_records(
    packed: Iterable[bytes], folder: str | os.PathLike, shard_records: int = 50_000
) -> int:
    """Write what ``pack_record`` made into a folder, in files of ``shard_records``.

    Returns how many. The folder appears under its name only when it is whole, and must not exist.
    Raises MMJaxError where it cannot be written.
    """
    folder = Path(folder)
    refuse_existing(folder)
    if shard_records < 1:
        raise MMJaxError(f"shard_records {shard_records}: a file holds at least one record")
    _, writer_of = _array_record()
    written = 0
    writer: Any = None
    with contextlib.ExitStack() as stack:
        with _told(folder):
            partial = stack.enter_context(new_folder(folder))
        for raw in packed:
            with _told(folder):
                if written % shard_records == 0:
                    if writer is not None:
                        writer.close()
                    name = f"records-{written // shard_records:05}{SUFFIX}"
                    # Images are compressed already; groups of one record are read one by one.
                    writer = writer_of(os.fspath(partial / name), "group_size:1,uncompressed")
                writer.write(raw)
            written += 1
        if not written:
            raise MMJaxError(f"{folder}: there is no record to write")
        with _told(folder):
            writer.close()
    return written


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn what keeps records from being written into an MMJaxError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the writer's own are the second
        raise MMJaxError(
            f"{folder} cannot be written: {error}; make room there, or give another folder"
        ) from error


def _frames(image: Any) -> list | tuple:
    """Return the frames of a video, or what is one by itself."""
    return image if isinstance(image, list | tuple) else (image,)


def _encoded(image: ImageSource) -> bytes:
    """Return an image's file as it is, or PNG for pixels."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except OSError as e:
            raise BadSample("missing_image", f"{image}: cannot be read: {e.strerror}") from e
    buffer = io.BytesIO()
    Image.fromarray(load_rgb(image)).save(buffer, "PNG")
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """Turn numpy values in meta into what JSON knows."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} {value!r:.40}")


def _array_record() -> tuple[Any, Any]:
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as e:
        raise MMJaxError("ArrayRecord files need array_record: pip install 'mmjax[formats]'") from e
    return ArrayRecordDataSource, ArrayRecordWriter
