"""Files of torch.save written without torch: torch itself reads them, and so do we."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from mmjax.weights import torch_file
from mmjax.weights.rules import Tensor
from mmjax.weights.torch_archive import read_torch
from mmjax.weights.torch_file import write_torch

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_)


def tensors():
    rng = np.random.default_rng(0)
    arrays = {f"part.{np.dtype(d)}": rng.integers(0, 2, (2, 3, 5)).astype(d) for d in DTYPES}
    arrays |= {"one": np.float32(3.5), "none": np.zeros((0, 4), np.float32)}
    arrays |= {"wärme": rng.normal(size=(7,)).astype(np.float32)}
    return {k: np.asarray(v) for k, v in arrays.items()}


def write(file, arrays, **kwargs):
    write_torch(
        file, [Tensor(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()], **kwargs
    )


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_was_written(tmp_path, mmap):
    arrays, told = tensors(), []
    write(tmp_path / "a.pt", arrays, progress=told.append)
    assert sum(told) == sum(v.nbytes for v in arrays.values())
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert list(loaded) == list(arrays)
    for key, want in arrays.items():
        assert str(loaded[key].dtype).removeprefix("torch.") == str(want.dtype)
        assert tuple(loaded[key].shape) == want.shape and loaded[key].is_contiguous()
        np.testing.assert_array_equal(loaded[key].double().numpy(), want.astype(np.float64))
    assert all(t.data_ptr() % 64 == 0 for t in loaded.values() if mmap and t.numel())


def test_the_same_tensors_make_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    write(tmp_path / "a.pt", tensors())
    monkeypatch.setattr("time.time", lambda: 1e9)
    write(tmp_path / "b.pt", tensors())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_our_own_reader_takes_it(tmp_path):
    arrays = tensors()
    write(tmp_path / "a.pt", arrays)
    infos = read_torch(tmp_path / "a.pt")
    assert infos.keys() == arrays.keys()
    for key, want in arrays.items():
        assert infos[key].dtype == want.dtype and infos[key].offset % 64 == 0
        np.testing.assert_array_equal(infos[key].read(), want)


def test_members_of_gigabytes_keep_their_alignment(tmp_path, monkeypatch):
    """What zipfile does from 2 GiB on, with a limit that a test can reach."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    arrays = {"a": np.arange(120.0), "b": np.arange(400.0), "c": np.arange(3.0)}
    write(tmp_path / "a.pt", arrays)
    assert all(i.offset % 64 == 0 for i in read_torch(tmp_path / "a.pt").values())
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    np.testing.assert_array_equal(loaded["b"].numpy(), arrays["b"])


def test_numbers_beyond_32_bits_are_written_whole():
    big = torch_file._pickle([Tensor("x", (2**31, 2), np.dtype(np.uint8), None)])
    assert all(n.to_bytes(5, "little") in big for n in (2**31, 2**32))
