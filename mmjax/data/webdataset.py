"""WebDataset shards with random access: tar files whose members of one name are a sample.

A sample is a run of bytes in its shard, ``000017.jpg`` and ``000017.txt`` one behind the other.
Where each run begins is found once, from the headers, and kept in an index beside the shard
(``index_cache``); after that a sample is one read.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.index_cache import Arrays, cached_index
from mmjax.data.skips import listed_as
from mmjax.data.tar_members import DamagedTar, check_end, read_member
from mmjax.data.turns import IMAGE_MARK
from mmjax.types import BadSample, Message, MMJaxError, Record

ShardPaths = str | os.PathLike | Sequence[str | os.PathLike]
"""A shard, a folder of ``*.tar``, a pattern (``laion-{000..231}.tar``, ``{a,b}/*.tar``), or a list
of these."""

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__(/|$)")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_THREADS = 8  # indexes are built and read at once: on network disks it is the waiting that costs


@dataclasses.dataclass(frozen=True)
class Sample:
    """The files of one sample by suffix, ``{"jpg": bytes, "txt": bytes}``.

    id: shard and name, unique where names are only unique in their shard. shard: the file; offset:
    the byte at which the sample begins.
    """

    id: str
    files: Mapping[str, bytes]
    shard: str
    offset: int

    @property
    def where(self) -> str:
        """Name the place for a message."""
        return f"{self.shard}: byte {self.offset} (id {self.id})"

    @property
    def meta(self) -> dict[str, Any]:
        """Return what a record says of where it is from."""
        return {"id": self.id, "source": self.shard, "line": self.offset}


class Shards:
    """The samples of WebDataset shards in file order: ``len(shards)``, ``shards[i] -> Sample``.

    Names are split as WebDataset does: the key ends at the first dot behind the last slash, and a
    sample ends where the key changes or a suffix comes again. damaged: ``"error"`` refuses a shard
    that is cut off or broken; ``"skip"`` takes the samples before the damage, but for the last of
    them, which may not be whole.
    Raises MMJaxError for missing, compressed and damaged shards, naming shard and byte.
    """

    def __init__(
        self,
        path: ShardPaths,
        damaged: str = "error",
        index_dir: str | os.PathLike | None = None,
    ):
        if damaged not in ("error", "skip"):
            raise MMJaxError(f"damaged {damaged!r}: 'error', or 'skip' to take what is whole")
        self.files = expand_shards(path)

        def load(file: Path) -> Arrays:
            return cached_index(file, [file], "whole shard", lambda: index_shard(file), index_dir)

        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(load, self.files))
        if damaged == "error":
            wrong = [(f, a["damage"][0].decode()) for f, a in zip(self.files, found, strict=True)]
            wrong = [(file, says) for file, says in wrong if says]
            if wrong:
                raise MMJaxError(
                    f"{wrong[0][0]}: {wrong[0][1]}; fetch it again, or set damaged='skip' to take "
                    f"the samples before the damage ({len(wrong)} of {len(self.files)} shards are "
                    "damaged)"
                )
        self._starts = [a["starts"] for a in found]  # int64[n+1] each
        self._ends = np.cumsum([len(starts) - 1 for starts in self._starts])
        if not len(self):
            raise MMJaxError(f"{self.files[0]} (of {len(self.files)} shards): there is no sample")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        place = index - int(self._ends[number])  # from the end of the shard, below zero
        starts, file = self._starts[number], self.files[number]
        start, end = int(starts[place - 1]), int(starts[place])
        try:
            # Opened for each read: a process may not hold as many files as there are shards.
            with open(file, "rb", buffering=0) as opened:
                raw = os.pread(opened.fileno(), end - start, start)
            if len(raw) < end - start:
                raise DamagedTar(f"{len(raw)} of its {end - start} bytes are there")
            key, files = _read_sample(raw)
        except (OSError, DamagedTar) as e:
            reason = "the shard has changed since it was opened, or the disk is failing"
            raise BadSample("bad_record", f"{file}: sample at byte {start}: {e}; {reason}") from e
        return Sample(f"{file.name}/{key}", files, str(file), start)


class LaionSource:
    """Pictures and captions as LAION's are kept: ``jpg``, ``png`` or ``jpeg`` beside ``txt``.

    A record asks nothing: its picture, and the caption as the assistant's turn, for the template
    ``laion_caption``. Other files of a sample, such as img2dataset's ``json``, are left alone.
    Arguments and errors are those of ``Shards``.
    """

    def __init__(
        self,
        path: ShardPaths,
        damaged: str = "error",
        index_dir: str | os.PathLike | None = None,
    ):
        self._shards = Shards(path, damaged, index_dir)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Record:
        sample = self._shards[index]
        with listed_as(sample.meta):
            return _pair(sample)


def _pair(sample: Sample) -> Record:
    image = next((sample.files[s] for s in ("jpg", "png", "jpeg") if s in sample.files), None)
    if image is None or "txt" not in sample.files:
        found = ", ".join(sample.files)
        reason, what = ("missing_image", "jpg, png or jpeg") if image is None else _NO_TEXT
        raise BadSample(reason, f"{sample.where}: there is no {what} (found {found})")
    return pair_record(image, sample.files["txt"], f"{sample.where}: txt", sample.meta)


_NO_TEXT = ("empty_answer", "txt, its caption")


def pair_record(image: bytes, caption: bytes, where: str, meta: Mapping[str, Any]) -> Record:
    """Return the record of a picture and its caption, for the template ``laion_caption``.

    image: its file; caption: UTF-8; where: of the caption, for a message. Raises BadSample.
    """
    try:
        text = caption.decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        raise BadSample("bad_record", f"{where} is not UTF-8 ({e})") from e
    messages = Message("user", IMAGE_MARK), Message("assistant", text)
    return Record(messages, (image,), {**meta, "answers": [text]})


def index_shard(path: Path) -> Arrays:
    """Find the samples of a shard: where each starts, int64[n+1], the last one their end.

    ``damage`` is one text, empty for a sound shard; the last sample before it is left out. Raises
    MMJaxError for a compressed file.
    """
    starts: list[int] = []
    key: str | None = None
    suffixes: set[str] = set()
    damage, at = "", 0
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        _check_kind(path, read(0, 6))
        while True:
            try:
                member = read_member(read, at, end)
                if member is None:
                    check_end(read, at, end)
            except DamagedTar as e:
                damage = str(e)
                at = starts.pop() if starts else 0
                break
            if member is None:
                break
            name = _split(member.name) if member.is_file else None
            if name is not None:
                if name[0] != key or name[1] in suffixes:
                    starts.append(member.start)
                    key, suffixes = name[0], set()
                suffixes.add(name[1])
            at = member.next
    return {"starts": np.array([*starts, at], np.int64), "damage": np.array([damage.encode()])}


def expand_shards(path: ShardPaths) -> list[Path]:
    """Write out folders, braces and wildcards, in order; MMJaxError names what is missing."""
    found: list[Path] = []
    for item in [path] if isinstance(path, str | os.PathLike) else path:
        text = os.fspath(item)
        if text.startswith("pipe:") or "://" in text:
            raise MMJaxError(
                f"{text}: shards are read at random, from files; copy them to a disk, or mount the "
                "bucket, and give the path"
            )
        for name in _expand_braces(text):
            if os.path.isdir(name):
                inside = sorted(Path(name).glob("*.tar"))
                if not inside:
                    raise MMJaxError(f"{name}: this folder holds no file *.tar")
                found += inside
            elif glob.has_magic(name) and not os.path.exists(name):
                inside = sorted(map(Path, glob.glob(name)))
                if not inside:
                    raise MMJaxError(f"{name}: no file matches this pattern")
                found += inside
            else:
                found.append(Path(name))
    absent = [file for file in found if not file.is_file()]
    if absent or not found:
        raise MMJaxError(
            f"{absent[0] if absent else path}: no such file ({len(absent)} of {len(found)} shards "
            "are missing); check the path, or the ends of its {first..last}"
        )
    return found


def _expand_braces(text: str) -> Iterable[str]:
    """Expand ``{a,b}`` and ``{000..012}`` as a shell does, with the width of the first number."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        ends = _RANGE.fullmatch(part) if i % 2 else None
        if ends:
            first, last = int(ends[1]), int(ends[2])
            width = len(ends[1]) if ends[1].startswith("0") else 0
            step = 1 if first <= last else -1
            choices.append([f"{n:0{width}}" for n in range(first, last + step, step)])
        elif i % 2:
            choices.append(part.split(",") if "," in part else [f"{{{part}}}"])
        else:
            choices.append([part])
    return map("".join, itertools.product(*choices))


def _split(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and suffix; None for what belongs to no sample."""
    found = _NAME.fullmatch(name)
    if found is None or _META.match(name):
        return None
    return found[1], found[2].lower()


def _read_sample(raw: bytes) -> tuple[str, dict[str, bytes]]:
    """Read the members of a run of bytes: the sample's key, and its files by suffix."""
    files: dict[str, bytes] = {}
    key, at = "", 0
    while at < len(raw):
        member = read_member(lambda offset, n: raw[offset : offset + n], at, len(raw))
        if member is None:
            break
        name = _split(member.name) if member.is_file else None
        if name is not None:
            key = name[0]
            files[name[1]] = raw[member.data : member.data + member.size]
        at = member.next
    return key, files


def _check_kind(path: Path, opening: bytes) -> None:
    """Raise MMJaxError for a compressed file: there is no reading in the middle of one."""
    for magic, name, tool in _COMPRESSED:
        if opening.startswith(magic):
            raise MMJaxError(
                f"{path}: is compressed with {name}, and shards are read at random; unpack it "
                f"({tool}). Its pictures are compressed already: it will hardly grow"
            )


_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
)
