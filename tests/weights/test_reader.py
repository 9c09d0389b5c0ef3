"""Checkpoint folders and safetensors files: what is there, and what is wrong."""

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.types import MMJaxError
from mmjax.weights import writer
from mmjax.weights.reader import Overlay, Renamed, open_reader
from mmjax.weights.rules import Tensor
from mmjax.weights.torch_file import write_torch
from mmjax.weights.writer import Arrays, atomic_folder, write_shards


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(4, 3)).astype(dtype) for name in ("a", "b", "c")}


def as_tensors(arrays):
    return [Tensor(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_not_there_are_named(tmp_path, name):
    """As in a folder of links into a cache that was emptied, or a clone without git-lfs."""
    file = tmp_path / name
    file.symlink_to("/nowhere/blob")
    with pytest.raises(
        MMJaxError, match=rf"{name}, a link to /nowhere/blob cannot be read \(No such.*download it"
    ):
        open_reader(tmp_path)
    file.unlink()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(MMJaxError, match=rf"{name}: a pointer of git-lfs.*git lfs pull"):
        open_reader(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(MMJaxError, match=rf"{name} cannot be read \(Is a directory"):
        open_reader(tmp_path)


def test_what_lies_beside_a_model_is_no_part_of_it(tmp_path):
    """An adapter, what a trainer saves, and the same tensor in two shards of one index."""
    want, other = tensors(), {k: v + 1 for k, v in tensors().items()}
    save_file(other, tmp_path / "adapter_model.safetensors")
    assert np.array_equal(open_reader(tmp_path).read("a"), other["a"])
    save_file(want, tmp_path / "clip.safetensors")
    assert np.array_equal(open_reader(tmp_path).read("a"), want["a"])
    (tmp_path / "clip.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    write_torch(tmp_path / "clip.pth", as_tensors(want))
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "scaler.pt",
        "non_lora_trainables.bin",
    ):
        (tmp_path / name).touch()
    assert np.array_equal(open_reader(tmp_path).read("a"), want["a"])
    twice = tmp_path / "twice"
    twice.mkdir()
    for i in (1, 2):
        save_file(want, twice / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(MMJaxError, match=r"'a' stands in both model-00001.*model-00002.*of one"):
        open_reader(twice)
    (twice / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MMJaxError, match="1 of 2 shards are there"):
        open_reader(twice)
    for other in ("other-00001-of-00001", "other-00002-of-00002", "model-00002-of-00003"):
        save_file({"d": want["a"]}, twice / f"{other}.safetensors")
        with pytest.raises(MMJaxError, match=rf"model-00001.*{other}.*which one is the model"):
            open_reader(twice)
        (twice / f"{other}.safetensors").unlink()


DTYPES = (
    np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.uint16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_safetensors_library_writes(tmp_path, dtype):
    arrays = tensors(dtype)
    save_file(arrays, tmp_path / "model.safetensors")
    reader = open_reader(tmp_path)
    assert set(reader.keys()) == set(arrays)
    for key, want in arrays.items():
        assert reader.dtype(key) == dtype and reader.shape(key) == (4, 3)
        assert np.array_equal(reader.read(key), want)
        assert np.array_equal(reader.read(key, (slice(1, 3), slice(2))), want[1:3, :2])


def test_shards_are_bounded_and_indexed(tmp_path):
    arrays = tensors()
    names = write_shards(tmp_path, as_tensors(arrays), shard_bytes=100)
    assert names == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 48
    assert index["weight_map"]["c"] == names[1]
    reader = open_reader(tmp_path)
    assert all(np.array_equal(reader.read(k), v) for k, v in arrays.items())
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(open_reader(tmp_path).keys()) == set(arrays)
    # A tensor beyond the limit stands alone, and each shard is filled anew.
    for limit, want in ((47, ["a", "b", "c", "d"]), (100, ["ab", "cd"])):
        (folder := tmp_path / str(limit)).mkdir()
        four = as_tensors(arrays | {"d": arrays["a"]})
        files = [folder / name for name in write_shards(folder, four, shard_bytes=limit)]
        assert ["".join(open_reader(file).keys()) for file in files] == want
        lengths = [int.from_bytes(file.read_bytes()[:8], "little") for file in files]
        assert not any(n % 8 for n in lengths)  # numbers of eight bytes can be mapped


def test_missing_shard_is_named(tmp_path):
    names = write_shards(tmp_path, as_tensors(tensors()), shard_bytes=100)
    (tmp_path / names[1]).unlink()
    with pytest.raises(MMJaxError, match=f"1 of 2 shards are missing, first {names[1]}"):
        open_reader(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(MMJaxError, match="1 of 2 shards are there"):
        open_reader(tmp_path)


@pytest.mark.parametrize("keep", [4, 40, -10])
def test_truncated_safetensors_says_so(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(MMJaxError, match=r"model\.safetensors: .*truncated, download it again"):
        open_reader(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "notjson!",
        *(
            json.dumps({"a": dict(dtype="F32", shape=shape, data_offsets=offsets)})
            for shape, offsets in (([2], [-8, 0]), ([-2, -1], [0, 8]), ([2], [0, 12]))
        ),
    ],
)
def test_garbage_header_says_so(tmp_path, header):
    text = header.encode() + b" " * 20  # so that no number lies beyond the end
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + text)
    with pytest.raises(MMJaxError, match="not that of a safetensors file"):
        open_reader(tmp_path)


def test_index_cannot_point_outside_its_folder(tmp_path):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MMJaxError, match="outside its folder"):
        open_reader(tmp_path)


def test_folder_without_weights_and_ambiguous_folder(tmp_path):
    with pytest.raises(MMJaxError, match="holds no weights"):
        open_reader(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        save_file(tensors(), tmp_path / name)
    with pytest.raises(MMJaxError, match="which one is the model"):
        open_reader(tmp_path)
    assert set(open_reader(tmp_path / "one.safetensors").keys()) == {"a", "b", "c"}


def indexed(folder, stem, suffix, arrays):
    """Write one shard and its index, as transformers names them."""
    shard = f"{stem}-00001-of-00001.{suffix}"
    (folder / f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(arrays, shard)})
    )
    if suffix == "safetensors":
        save_file(arrays, folder / shard)
    else:
        write_torch(folder / shard, as_tensors(arrays))


def test_safetensors_win_over_pickles_and_usual_names_over_variants(tmp_path):
    """The same tensors twice, with other numbers: which of them are read."""
    want, other = tensors(), {k: v + 1 for k, v in tensors().items()}
    save_file(want, tmp_path / "model.safetensors")
    indexed(tmp_path, "pytorch_model", "bin", other)
    assert np.array_equal(open_reader(tmp_path).read("a"), want["a"])
    (tmp_path / "pytorch_model-00001-of-00001.bin").unlink()  # its index alone was downloaded
    assert np.array_equal(open_reader(tmp_path).read("a"), want["a"])
    (tmp_path / "model.safetensors").unlink()
    indexed(tmp_path, "model.fp16", "safetensors", other)
    assert np.array_equal(open_reader(tmp_path).read("a"), other["a"])
    indexed(tmp_path, "model.fp8", "safetensors", other)
    with pytest.raises(MMJaxError, match=r"model\.fp16\..*model\.fp8\..*which one"):
        open_reader(tmp_path)
    indexed(tmp_path, "model", "safetensors", want)
    assert np.array_equal(open_reader(tmp_path).read("a"), want["a"])
    # A whole file goes before shards, which may be older, and before variants of it.
    for variant in ("model.fp16.safetensors", "model-00001-of-00001.safetensors"):
        save_file(other, tmp_path / variant)
    save_file(want, tmp_path / "model.safetensors")
    assert np.array_equal(open_reader(tmp_path).read("a"), want["a"])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.fp16.safetensors"])
def test_a_pickle_of_the_usual_name_is_the_model_whatever_lies_beside_it(tmp_path, name):
    save_file({k: v + 1 for k, v in tensors().items()}, tmp_path / name)
    write_torch(tmp_path / "pytorch_model.bin", as_tensors(tensors()))
    assert np.array_equal(open_reader(tmp_path).read("a"), tensors()["a"])


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_names_no_files_says_so(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MMJaxError, match=r"index\.json: not a weight index"):
        open_reader(tmp_path)


def test_renamed_and_overlaid_readers():
    base, new = Arrays(tensors()), Arrays({"y": np.zeros(2)})
    renamed = Renamed(base, {"a": "x", "b": "y", "c": None}.get)
    both = Overlay(renamed, new)
    assert set(both.keys()) == {"x", "y"}
    assert both.shape("x") == (4, 3) and both.shape("y") == (2,)
    assert np.array_equal(both.read("x"), tensors()["a"])


def test_a_shard_is_filled_up_to_its_size_and_a_larger_tensor_has_one_alone(tmp_path):
    sizes = {"a": 3, "b": 1, "c": 1, "d": 1}
    arrays = {key: np.full(n, n, np.float32) for key, n in sizes.items()}
    names = write_shards(tmp_path, as_tensors(arrays), shard_bytes=8)
    held = [sorted(open_reader(tmp_path / name).keys()) for name in names]
    assert held == [["a"], ["b", "c"], ["d"]]


@pytest.mark.parametrize("total, free, fits", [(100, 10, False), (100, 50, True), (0, 0, True)])
def test_a_folder_is_begun_only_where_it_has_room(tmp_path, monkeypatch, total, free, fits):
    """A file system that tells no size may have room."""
    disk = SimpleNamespace(total=total, free=free)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: disk)
    if fits:
        with atomic_folder(tmp_path / "m", nbytes=50):
            pass
    else:
        with (
            pytest.raises(MMJaxError, match="it takes 5e-08 GB, and 1e-08 GB are free"),
            atomic_folder(tmp_path / "m", nbytes=50),
        ):
            raise AssertionError("begun")
    assert [x.name for x in tmp_path.iterdir()] == ["m"] * fits
