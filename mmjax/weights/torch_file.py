"""Write tensors as a file of ``torch.save``, without torch and one tensor at a time.

The format of torch 1.6 and later: a zip of uncompressed members, ``data.pkl`` with the names and
one ``data/<i>`` for each tensor's numbers.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmjax.weights.pickles import STORAGES
from mmjax.weights.rules import Tensor
from mmjax.weights.tensor_info import row_major

_ROOT = "archive"
_ALIGNMENT = 64  # of each tensor's first byte, so that torch can map the file
_STORAGE_NAMES = {
    np.dtype(dtype): name for name, dtype in STORAGES.items() if name != "UntypedStorage"
}


def write_torch(
    file: str | Path,
    tensors: Sequence[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a dict of tensors that ``torch.load`` reads, with ``weights_only`` too."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        # By ZipInfo, as a bare name takes the time of day into the file.
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/data.pkl"), _pickle(tensors))
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/byteorder"), b"little")
        for i, tensor in enumerate(tensors):
            member = _member(archive, f"{_ROOT}/data/{i}", tensor.nbytes)
            with archive.open(member, "w") as stream:
                array = np.ascontiguousarray(tensor.make())
                stream.write(array.reshape(-1).view(np.uint8).data)
            del array  # or it would live on while the next one is made
            if progress is not None:
                progress(tensor.nbytes)
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/version"), b"3\n")


def _member(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """Return the entry of a member whose contents begin at a multiple of the alignment."""
    member = zipfile.ZipInfo(name)
    member.file_size = size  # tells zipfile whether the header needs numbers of 64 bits
    long = size * 1.05 > zipfile.ZIP64_LIMIT
    start = archive.start_dir + 30 + len(name) + (20 if long else 0) + 4
    pad = -start % _ALIGNMENT
    member.extra = struct.pack("<HH", 0x4246, pad) + bytes(pad)  # "FB", as torch fills its own
    return member


def _pickle(tensors: Sequence[Tensor]) -> bytes:
    """Return the pickle of ``{key: tensor}``, protocol 2, as torch writes one.

    It is put together by hand: pickle itself looks up every name it writes, and so needs torch.
    """
    out = [b"\x80\x02}("]
    for i, tensor in enumerate(tensors):
        count = tensor.nbytes // tensor.dtype.itemsize
        out += [
            _text(tensor.key),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage"),
            f"ctorch\n{_STORAGE_NAMES[np.dtype(tensor.dtype)]}\n".encode(),
            _text(str(i)) + _text("cpu") + _number(count) + b"tQ",
            _number(0) + _numbers(tensor.shape) + _numbers(row_major(tensor.shape)),
            b"\x89ccollections\nOrderedDict\n)RtR",  # no gradient, no hooks
        ]
    return b"".join([*out, b"u."])


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(n: int) -> bytes:
    if n < 2**31:
        return b"J" + struct.pack("<i", n)
    size = n.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + n.to_bytes(size, "little", signed=True)


def _numbers(numbers) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
