"""Pickled checkpoints: read without torch, and nothing in them is run."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmjax.types import MMJaxError
from mmjax.weights import pickles
from mmjax.weights.torch_archive import read_torch

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_equal_those_of_torch(tmp_path, dtype, zipped):
    x = (torch.arange(24).reshape(2, 3, 4) % 5).to(dtype)
    file = tmp_path / "a.pt"
    tree = {"x": x, "turned": x.permute(2, 0, 1), "tail": x[1, 1:], "one": x[1, 2, 3].clone()}
    torch.save(tree, file, _use_new_zipfile_serialization=zipped)
    infos = read_torch(file)
    for name, want in tree.items():
        got = infos[name].read()
        assert got.shape == tuple(want.shape)
        assert str(got.dtype) == str(dtype).removeprefix("torch.")
        assert np.array_equal(got.astype(np.float64), want.double().numpy()), name
        assert not got.flags.writeable


def test_parameters_and_ordered_dicts_are_read(tmp_path):
    linear = torch.nn.Linear(3, 2)
    torch.save(linear.state_dict(), tmp_path / "a.pt")
    torch.save(collections.OrderedDict(linear.named_parameters()), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        infos = read_torch(tmp_path / name)
        assert np.array_equal(infos["weight"].read(), linear.weight.detach().numpy())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_archives_give_their_tensors(tmp_path):
    """The form of OpenAI's own CLIP files."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, bias=False))
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
            self.register_buffer("input_resolution", torch.tensor(224))
            self.logit_scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.visual(x)

    model = Model().half()
    torch.jit.script(model).save(tmp_path / "clip.pt")
    infos = read_torch(tmp_path / "clip.pt")
    want = model.state_dict()
    assert infos.keys() == want.keys()
    for name, tensor in want.items():
        assert infos[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(infos[name].read(), tensor.numpy(), err_msg=name)


def test_training_checkpoints_give_their_model(tmp_path):
    torch.save(
        {
            "model": {"module.a": torch.ones(2), "module.part": {"b": torch.zeros(3)}},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(5)}}},
            "rng_state": [{"np": np.random.get_state()}],
            "iteration": 7,
        },
        tmp_path / "a.pt",
    )
    assert set(read_torch(tmp_path / "a.pt")) == {"a", "part.b"}


def test_of_a_tree_the_model_is_taken_and_nothing_of_it_left_out(tmp_path):
    one, two = {"a": torch.ones(1)}, {"b": torch.ones(1)}
    for tree, want in (
        ({"module.a": one["a"], "b": two["b"]}, {"module.a", "b"}),  # no wrapper's prefix then
        ({"module.module.a": one["a"]}, {"a"}),
        ({"model_state_dict": one, "epoch": 3}, {"a"}),
        ({"model": two, "state_dict": one, "ema": two}, {"a"}),
        ({"model": one, "ema": two, "lr_scheduler": two, "args": two}, {"a"}),
        ({"model": one, "module": two}, {"model.a", "module.b"}),  # two parts of a model
        ({"model": one, "norm": two["b"]}, {"model.a", "norm"}),
        ({"state_dict": one, "norm": two["b"]}, {"state_dict.a", "norm"}),
        ({"state_dict": {"model": one}}, {"a"}),
    ):
        torch.save(tree, tmp_path / "a.pt")
        assert set(read_torch(tmp_path / "a.pt")) == want


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, zipped):
    file, proof = tmp_path / "a.bin", tmp_path / "ran"
    tree = {"w": torch.ones(2), "x": Evil(f"touch {proof}")}
    torch.save(tree, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(MMJaxError, match=r"posix\.system.*safetensors"):
        read_torch(file)
    assert not proof.exists()


def test_bare_malicious_pickle_is_refused_and_not_run(tmp_path):
    file, proof = tmp_path / "a.bin", tmp_path / "ran"
    file.write_bytes(pickle.dumps(Evil(f"touch {proof}")))
    with pytest.raises(MMJaxError, match="refused"):
        read_torch(file)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch.load", "os.environ"])
def test_other_globals_are_named(tmp_path, name):
    module, attribute = name.rsplit(".", 1)
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", f"c{module}\n{attribute}\n.")
    with pytest.raises(MMJaxError, match=name):
        read_torch(tmp_path / "a.pt")


HOSTILE = {
    "changes a function": b"ctorch._utils\n_rebuild_tensor\n(N}U\x0c__defaults__(I1\ntstb.",
    "holds itself": b"}q\x00U\x01ah\x00s.",
    "holds itself as its model": b"}q\x00U\x05modelh\x00s.",
    "is deep": b"}U\x01a" * 5000 + b"}" + b"s" * 5000 + b".",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_and_change_nothing(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + HOSTILE[name])
    with pytest.raises(MMJaxError, match="not a readable torch file"):
        read_torch(tmp_path / "a.pt")
    assert pickles._rebuild_tensor.__defaults__ is None


def test_numbers_that_are_cut_off_or_turned_round_are_refused(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"w": torch.arange(4.0)}, file)

    def refused(part, change, says):
        with zipfile.ZipFile(file) as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
            for member in source.infolist():
                data = source.read(member)
                target.writestr(member.filename, change(data) if part in member.filename else data)
        with pytest.raises(MMJaxError, match=says):
            read_torch(tmp_path / "b.pt")

    refused("/data/", lambda x: x[:8], "'w' needs 16 bytes of a storage of 8")
    refused("/byteorder", lambda x: b"big", "big-endian torch files are not supported")
    raw = bytearray(file.read_bytes())
    entry = raw.rfind(b"a/data/0") - 46  # of the zip's directory
    for at, value, says in (
        (10, b"\x63", "in way 99"),
        (26, b"\x01", "ends at byte 6.* a file of"),
    ):
        other = raw.copy()
        other[entry + at : entry + at + 1] = value
        (tmp_path / "c.pt").write_bytes(other)
        with pytest.raises(MMJaxError, match=f"damaged zip, a/data/0 .*{says}"):
            read_torch(tmp_path / "c.pt")
    with zipfile.ZipFile(file) as source:  # what says where the numbers of a member begin
        raw[source.getinfo("a/data/0").header_offset] = 0
    file.write_bytes(raw)
    with pytest.raises(MMJaxError, match="damaged zip, no header at a/data/0"):
        read_torch(file)


@pytest.mark.parametrize(
    "change",
    [
        dict(offset=-1),
        dict(shape=(-2,)),
        dict(strides=(-1,)),
        dict(strides=(1, 1)),
        dict(shape=(2.0,)),
        dict(key="1"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_before_it_is_mapped(change):
    """Numbers of a pickle, by which memory beside the file would be read."""

    def located(key="0", offset=1, shape=(3,), strides=(1,)):
        storage = pickles._Storage(np.dtype("f4"), 4, key, {"0": (64, 16, None)})
        tensor = pickles.PickledTensor(storage, offset, shape, strides, storage.dtype)
        return tensor.locate(Path("a.pt"), "w")

    assert located().offset == 68
    with pytest.raises(MMJaxError, match="a.pt: tensor 'w' has no storage in the file"):
        located(**change)
    with pytest.raises(MMJaxError, match="'w' needs 20 bytes of a storage of 16"):
        located(offset=2)
    reader = pickles.Unpickler(io.BytesIO(), Path("a.pt"), {})
    assert reader.persistent_load(("storage", "HalfStorage", "0", "cpu", 4, None)).numel == 4
    for kind, name, view in (
        ("storage", "HalfStorage", ("1", 2, 4)),  # a part of another, as torch once wrote
        ("storage", "QInt8Storage", None),
        ("module", "HalfStorage", None),
    ):
        with pytest.raises(MMJaxError, match="a storage of an unknown kind"):
            reader.persistent_load((kind, name, "0", "cpu", 4, view))


def test_compressed_members_are_read(tmp_path):
    w = torch.arange(6.0)
    torch.save({"w": w, "tail": w[4:]}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    infos = read_torch(tmp_path / "b.pt")
    assert infos["w"].read().tolist() == [0, 1, 2, 3, 4, 5]
    assert infos["tail"].read().tolist() == [4, 5]


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_says_so(tmp_path, zipped):
    file = tmp_path / "a.pt"
    torch.save({"w": torch.randn(1000)}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(MMJaxError, match="copy it again"):
        read_torch(file)


def test_file_without_tensors_says_so(tmp_path):
    torch.save({"step": 3}, tmp_path / "a.pt")
    with pytest.raises(MMJaxError, match="holds no tensors"):
        read_torch(tmp_path / "a.pt")
