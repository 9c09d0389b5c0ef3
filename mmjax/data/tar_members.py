"""Members of a tar file, header by header: plain, ustar, GNU long names and PAX.

Python's tarfile takes a broken header behind the first for the end of the archive. A shard that is
damaged in the middle would lose samples without a word, so headers are read and checked here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

BLOCK = 512
_END = bytes(BLOCK)
_MOST_PADDING = 2**20  # behind the mark; tar writes 10 KiB at most unless it is told otherwise
_NO_DATA = b"123456"  # links, devices, folders, pipes
_LONG = b"xgLK"  # headers that say more about the member behind them

Read = Callable[[int, int], bytes]


class DamagedTar(Exception):
    """What is wrong, and the byte at which it was found."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of an archive: bytes [data, data + size); its headers begin at ``start``.

    next: where the next member's headers begin. is_file: False for folders and links.
    """

    name: str
    start: int
    data: int
    size: int
    next: int
    is_file: bool


def read_member(read: Read, start: int, end: int) -> Member | None:
    """Return the member whose headers begin at ``start``; None at the mark that ends an archive.

    read: (offset, length) -> bytes, fewer at the end; end: bytes there are. Raises DamagedTar for a
    header that is none, and for a member that is not whole.
    """
    at, name, size = start, None, None
    while True:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar(
                f"ends at byte {at + len(header)} without the mark that ends an archive"
            )
        if header == _END:
            return None
        kind, length = header[156:157], _checked_length(header, at)
        if kind not in _LONG:
            break
        body = read(at + BLOCK, length)
        if len(body) < length:
            raise DamagedTar(f"ends at byte {end}, within the long header at byte {at}")
        if kind == b"x":
            found = _pax(body, at)
            name = found.get(b"path", name)
            size = int(found[b"size"]) if found.get(b"size", b"").isdigit() else size
        elif kind == b"L":
            name = body.rstrip(b"\0")
        at += BLOCK + _padded(length)
    raw = _name(header) if name is None else name
    shown = raw.decode("utf-8", "replace")
    if kind == b"S":
        raise DamagedTar(f"member {shown!r} at byte {at} is a sparse file; write it anew whole")
    size = 0 if kind in _NO_DATA else length if size is None else size
    data = at + BLOCK
    if data + size > end:
        raise DamagedTar(
            f"member {shown!r} at byte {start} needs {size} bytes from {data} on, and the file "
            f"ends at byte {end}"
        )
    return Member(shown, start, data, size, data + _padded(size), kind not in _NO_DATA)


def check_end(read: Read, start: int, end: int) -> None:
    """Raise DamagedTar unless little but zeros follows the mark that ends an archive.

    A download with a hole in it has such a mark too, as have archives joined with ``cat``, and what
    stands behind it is never read. Arguments as of ``read_member``.
    """
    if read(start, _MOST_PADDING).strip(b"\0"):
        raise DamagedTar(
            f"zeros at byte {start} mark its end, and there is data behind them: a download with a "
            "hole, or archives that were joined, to be given one by one"
        )
    if end - start > _MOST_PADDING:
        raise DamagedTar(
            f"its last {end - start} bytes, from {start} on, begin with 1 MiB of zeros: a download "
            "that was broken off"
        )


def _checked_length(header: bytes, at: int) -> int:
    """Return the bytes a header says follow it; raises DamagedTar where its sum is wrong."""
    try:
        stated = _number(header[148:156])
        length = _number(header[124:136])
    except ValueError:
        stated, length = -1, 0
    if stated != sum(header) - sum(header[148:156]) + 8 * 32:  # its own field counts as spaces
        raise DamagedTar(f"there is no tar header at byte {at} (it begins {header[:16]!r})")
    return length


def _number(field: bytes) -> int:
    """Read octal digits, or the base-256 numbers of sizes above 8 GiB."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0]
    # GNU's own format, "ustar  ", keeps times where POSIX keeps the front of a long name.
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax(body: bytes, at: int) -> dict[bytes, bytes]:
    """Read PAX records, ``<length> <key>=<value>\\n``."""
    found: dict[bytes, bytes] = {}
    while body.strip(b"\0"):
        digits, _, rest = body.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, mark, value = rest[: length - len(digits) - 1].partition(b"=")
        if not length or not mark or not value.endswith(b"\n"):
            raise DamagedTar(f"the PAX header at byte {at} is broken")
        found[key] = value[:-1]
        body = body[length:]
    return found


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
