"""Converted folders: Orbax's format, loading onto devices, and what a killed conversion leaves."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as old
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from mmjax.models import converted, exports, opening, pretrained, registry
from mmjax.models.decoder import DecoderConfig
from mmjax.parallel.mesh import make_mesh, use
from mmjax.types import MMJaxError
from mmjax.weights import load, store
from mmjax.weights import rules as R
from mmjax.weights.writer import Arrays, atomic_folder, everywhere
from tests import tiny

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def params():
    family = registry.family("fuyu")
    with use():
        abstract = pretrained.abstract_params(family, tiny.CONFIG)
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=v.shape).astype(np.float32) for k, v in abstract.items()}


@pytest.fixture(scope="module")
def hub(params, tmp_path_factory):
    """A checkpoint in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub") / "fuyu"
    family = registry.family("fuyu")
    tensors = R.export(family.weights.rules(tiny.CONFIG), Arrays(params))
    exports.write_export(folder, tensors, {"config.json": tiny.CONFIG.to_hf()})
    return folder


def written(params, folder):
    converted.save_model(folder, params, family=registry.family("fuyu"), config=tiny.CONFIG)
    return folder


def test_orbax_restores_what_is_streamed(params, tmp_path):
    folder = written(params, tmp_path / "m")
    abstract = {}
    for name, x in params.items():
        *parents, last = name.split(".")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
    tree = ocp.load(folder / "params", abstract)
    flat = {
        ".".join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert flat.keys() == params.keys()
    assert all(np.array_equal(flat[k], params[k]) for k in params)


def test_a_folder_is_found_under_any_path_that_leads_there(params, tmp_path, monkeypatch):
    """With .. in it, behind a link too, where it leads elsewhere than its text says."""
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/down")
    written(params, tmp_path / "deep" / "m")
    monkeypatch.chdir(tmp_path / "deep")
    name = min(params)
    for path in ("m", "../deep/m", "../link/../m", f"{tmp_path}/deep/../deep/m"):
        reader = opening.open_pretrained(path).reader
        np.testing.assert_array_equal(reader.read(name, ...), params[name])
    writer = store.StoreWriter(Path("../s"), {"a": ((2,), np.dtype(np.float32), (2,))})
    writer.write("a", (slice(0, 2),), np.float32([1, 2]))
    writer.close()
    assert store.StoreReader("down/../../s").read("a").tolist() == [1, 2]


def test_orbax_restores_onto_a_mesh(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 8, 6)).astype("bfloat16")
    x[1] = 0  # as half of a new adapter is: a chunk like any other
    writer = store.StoreWriter(tmp_path / "s", {"a.b": (x.shape, x.dtype, (1, 8, 6))})
    for i in range(4):
        writer.write("a.b", (slice(i, i + 1), slice(0, 8), slice(0, 6)), x[i : i + 1])
    writer.close()
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    abstract = {"a": {"b": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}}
    got = ocp.load(tmp_path / "s", abstract)["a"]["b"]
    assert got.sharding == sharding and np.array_equal(got, x)


def test_slices_of_one_shape_are_brought_together_by_one_program():
    """As processes do for every piece of a model that they export."""
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    x = np.arange(96, dtype=np.float32).reshape(3, 8, 4)
    array = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    with jax.set_mesh(mesh):
        for i, most in ((0, 1), (1, 0), (2, 0)):
            part = array[i]
            compiled.clear()
            got = everywhere(part, mesh)
            assert got.is_fully_replicated and np.array_equal(got, x[i])
            assert len(compiled) <= most


def test_what_orbax_writes_is_read(tmp_path):
    """Of either version, and as nnx lays out its variables."""
    rows, kernel = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(2, np.float16)
    tree = {
        "layers": {"w": rows, "k": {"value": kernel}, "b": {"raw_value": kernel + 1}},
        "a.b": np.ones(2),
        "none": None,
    }
    ocp.save(tmp_path / "new", tree)
    old.PyTreeCheckpointer().save(tmp_path / "old", tree)
    (tmp_path / "inner").mkdir()
    old.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "inner" / "pytree", tree)
    for name in ("new", "old", "inner"):
        reader = store.StoreReader(tmp_path / name)
        assert set(reader.keys()) == {"layers.w", "layers.k", "layers.b", "a.b"}
        assert reader.read("layers.w", (slice(1, 2),)).tolist() == [[3.0, 4.0, 5.0]]
        assert [reader.read(f"layers.{x}").tolist() for x in "kb"] == [[0, 0], [1, 1]]
        assert reader.dtype("layers.k") == np.float16
        assert reader.nbytes() == 6 * 4 + 2 * 2 * 2 + 2 * 8
    # Versions before did not write chunks of zeros, and said so.
    about = reader.folder / "_METADATA"
    earlier = json.loads(about.read_text()) | {"store_array_data_equal_to_fill_value": False}
    about.write_text(json.dumps(earlier))
    (reader.folder / "layers.k.value" / "0").unlink()
    assert store.StoreReader(tmp_path / "inner").read("layers.k").tolist() == [0, 0]


@pytest.mark.parametrize("path", ["a#b ü", "relative"])
def test_what_orbax_writes_is_read_wherever_it_lies(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    ocp.save(tmp_path / path, {"w": jax.numpy.arange(3.0), "zeros": jax.numpy.zeros(2)})
    reader = store.StoreReader(path if path == "relative" else tmp_path / path)
    assert reader.read("w").tolist() == [0.0, 1.0, 2.0] and reader.read("zeros").tolist() == [0, 0]


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    "name, damage",
    [
        ("decoder.layers.mlp.up.kernel/c/0/0/0", Path.unlink),
        ("decoder.layers.mlp.up.kernel/c/0/0/0", cut),
        ("decoder.layers.mlp.up.kernel/zarr.json", Path.unlink),
        ("_METADATA", cut),
        (
            "_METADATA",
            lambda file: file.write_bytes(file.read_bytes().replace(b"key_m", b"kez_m", 1)),
        ),
    ],
)
def test_what_a_copy_lost_is_named_and_never_read_as_zeros(params, tmp_path, name, damage):
    tree = written(params, tmp_path / "m") / "params" / "state"
    damage(tree / name)
    with pytest.raises(MMJaxError, match=r"m/params/state.*copy it anew or make it again"):
        store.StoreReader(tree).read("decoder.layers.mlp.up.kernel")


@pytest.mark.parametrize("piece", [100, 10**6])
@pytest.mark.parametrize("on_device", [True, False])
def test_every_shard_is_read_and_only_by_slices(params, hub, monkeypatch, piece, on_device):
    monkeypatch.setattr(R, "PIECE_BYTES", piece)
    if on_device:  # assemble shards on the device, as on a GPU
        monkeypatch.setattr(load, "_shares_host_memory", lambda device: False)
    opened = opening.open_pretrained(hub)
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    specs = {
        "decoder.embed.embedding": ("tensor", "fsdp"),
        "decoder.layers.attn.q.kernel": (None, "fsdp", "tensor"),
        "decoder.layers.mlp.down.kernel": (None, "tensor", "fsdp"),
    }
    dtypes = {"decoder.layers.mlp.down.kernel": "bfloat16"}
    abstract = {
        k: jax.ShapeDtypeStruct(
            v.shape,
            dtypes.get(k, v.dtype),
            sharding=NamedSharding(mesh, PartitionSpec(*specs.get(k, ()))),
        )
        for k, v in params.items()
    }
    if piece == 100:  # three of the leaves are enough to go through the small pieces
        opened = dataclasses.replace(opened, ignore=(".",))  # the others may stay unread
        abstract = {k: abstract[k] for k in specs}
    seen = []
    got = pretrained.read_params(opened, abstract, progress=lambda *x: seen.append(x))
    for name, leaf in abstract.items():
        assert got[name].sharding == leaf.sharding
        assert np.array_equal(got[name], params[name].astype(leaf.dtype)), name
    bytes_read, totals = zip(*seen, strict=True)
    assert max(bytes_read) <= max(piece, 1024)
    assert set(totals) == {sum(bytes_read)}  # of what several devices hold, one copy


def test_what_is_not_asked_for_is_not_read(params, hub):
    opened, some, seen = opening.open_pretrained(hub), {"patch_embed.bias"}, []
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    got = pretrained.read_params(opened, abstract, only=some, progress=lambda *x: seen.append(x))
    size = params["patch_embed.bias"].nbytes
    assert got.keys() == some and seen == [(size, size)]
    np.testing.assert_array_equal(got["patch_embed.bias"], params["patch_embed.bias"])
    assert pretrained.read_params(opened, abstract, only=()) == {}
    short = abstract | {"patch_embed.kernel": jax.ShapeDtypeStruct((1, 1), np.float32)}
    with pytest.raises(MMJaxError, match="patch_embed|embed_tokens"):  # all the same, all must fit
        pretrained.read_params(opened, short, only=some)


def test_progress_counts_every_byte(params, hub, tmp_path):
    opened = opening.open_pretrained(hub)
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}
    plan = converted.plan_conversion(opened, abstract, "bfloat16")
    seen = []
    converted.write_converted(opened, plan, tmp_path / "m", progress=seen.append)
    assert sum(seen) == plan.nbytes == 2 * sum(v.size for v in params.values())


def test_existing_destination_stays_unless_overwritten(params, tmp_path):
    folder = written(params, tmp_path / "m")
    with pytest.raises(MMJaxError, match="--overwrite"), atomic_folder(folder):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder, overwrite=True):
        raise KeyboardInterrupt
    assert opening.open_pretrained(folder).kind == "mmjax"
    # In a container every process may have the number of one that was killed.
    (left := tmp_path / f"m.partial-{os.getpid()}").mkdir()
    (left / "config.json").touch()
    for name, destination in (("new", folder), ("first", tmp_path / "empty")):
        destination.mkdir(exist_ok=True)
        with atomic_folder(destination, overwrite=True) as partial:
            (partial / name).touch()
        assert [p.name for p in destination.iterdir()] == [name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "m"]


def test_ctrl_c_while_the_old_folder_is_deleted_leaves_no_second_model(
    params, tmp_path, monkeypatch
):
    folder = written(params, tmp_path / "m")
    (tmp_path / "m.replaced-7").mkdir()  # not marked: maybe the only one that is whole
    delete = shutil.rmtree

    def interrupted(path, **options):
        if Path(path).name == "params":
            raise KeyboardInterrupt
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder, overwrite=True) as partial:
        (partial / "config.json").touch()
    monkeypatch.undo()
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert (tmp_path / f"m.replaced-{os.getpid()}/params").is_dir()
    with atomic_folder(folder, overwrite=True) as partial:
        (partial / "config.json").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.replaced-7"]


def test_ctrl_c_waits_for_the_block_that_is_being_written(tmp_path, monkeypatch):
    """Its threads made the folder anew behind the back of who removed it, and there it stayed."""
    waited = []

    class Interrupted:
        """An array, and its write, whose end the keyboard does not await."""

        def __getitem__(self, index):
            return self

        def write(self, block):
            return self

        def result(self):
            raise KeyboardInterrupt

        def exception(self):
            waited.append("to its end")

    writer = store.StoreWriter(tmp_path / "s", {"w": ((2,), np.dtype(np.float32), (2,))})
    monkeypatch.setattr(writer, "_create", lambda *about: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        writer.write("w", (slice(0, 2),), np.zeros(2, np.float32))
    assert waited == ["to its end"]


@pytest.mark.parametrize(
    ("holds", "why"),
    [
        (
            ("config.json", "model.safetensors", "checkpoints/10/a", "hf/config.json"),
            "checkpoints, hf",
        ),
        (("notes.txt", "thesis.tex"), "no model"),
        ((), "a file"),
    ],
)
def test_overwriting_spares_what_is_no_model_folder(tmp_path, holds, why):
    """A whole home, or the source itself inside the destination, would go with it."""
    place = tmp_path / "m"
    for name in holds:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    if not holds:
        place.touch()
    with (
        pytest.raises(MMJaxError, match=f"m .*{why}.*delete it yourself"),
        atomic_folder(place, overwrite=True),
    ):
        pass
    assert all((place / name).read_text() == name for name in holds)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_destination_that_is_a_link_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk" / "m").mkdir(parents=True)
    (tmp_path / "disk" / "m" / "config.json").touch()
    for name, points in (("link", "disk/m"), ("dangling", "disk/n")):
        (tmp_path / name).symlink_to(points)
        with atomic_folder(tmp_path / name, overwrite=True) as partial:
            (partial / "new.bin").touch()
        assert (tmp_path / name).is_symlink()
        assert [p.name for p in (tmp_path / points).iterdir()] == ["new.bin"]
    with atomic_folder("disk/../here") as partial:
        (partial / "new.pt").touch()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_folder(".", overwrite=True) as partial:
        (partial / "newer").touch()
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["newer"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "disk", "here", "link"]
    with (
        pytest.raises(MMJaxError, match="/: a mounted disk cannot be replaced"),
        atomic_folder("/", overwrite=True),
    ):
        pass


def test_a_destination_that_cannot_be_written_is_named_and_left_as_it_was(params, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MMJaxError, match=r"file/m cannot be written \(Not a directory\)"):
        written(params, tmp_path / "file" / "m")
    writer = store.StoreWriter(tmp_path / "s", {"w": ((2,), np.dtype(np.float32), (2,))})
    (tmp_path / "s" / "state" / "w").touch()
    with pytest.raises(MMJaxError, match=r"s cannot be written \(.*give another destination"):
        writer.write("w", (slice(0, 2),), np.zeros(2, np.float32))
    folder = written(params, tmp_path / "m")
    with (
        pytest.raises(MMJaxError, match=r"m cannot be written \(No space left on device\)"),
        atomic_folder(folder, overwrite=True),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="source"), atomic_folder(folder, overwrite=True):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "source")  # of what is read
    with (
        pytest.raises(MMJaxError, match=r"m cannot be written \(it takes 1e\+09 GB, and .* free"),
        atomic_folder(folder, overwrite=True, nbytes=10**18),
    ):
        raise AssertionError("what has no room was begun")
    assert opening.open_pretrained(folder).kind == "mmjax"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m", "s"]


def test_killed_conversion_never_loads(hub, tmp_path):
    # The writer stops by itself in the middle, after saying so, and is killed there.
    script = f"""
import sys
from mmjax.weights import store
write, count = store.StoreWriter.write, [0]
def stall(self, *args):
    write(self, *args)
    count[0] += 1
    if count[0] == 9:
        print("half", flush=True)
        sys.stdin.read()
store.StoreWriter.write = stall
from convert_weights import to_jax
to_jax.main([{str(hub)!r}, {str(tmp_path / "m")!r}])
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert child.stdout.readline() == b"half\n"
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "m") as other:
        assert len(list(tmp_path.iterdir())) == 2  # one that is at work is left alone
        shutil.copytree(other, tmp_path / "m.partial-0")  # as another one, killed
        raise ZeroDivisionError
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    partial = tmp_path / f"m.partial-{child.pid}"
    shutil.copytree(partial, tmp_path / "kept")
    with atomic_folder(tmp_path / "m"):  # a next one removes what both have left
        assert len(list(tmp_path.glob("m.*"))) == 1
    (tmp_path / "m").rmdir()
    (tmp_path / "kept").rename(partial)
    assert partial.name.startswith("m.partial-") and any((partial / "params").rglob("c/*"))
    with pytest.raises(MMJaxError, match=r"no such file.*partial.*delete it and run"):
        opening.open_pretrained(tmp_path / "m")
    with pytest.raises(MMJaxError, match=r"half-written conversion, its writer was killed"):
        opening.open_pretrained(partial)
    # Even renamed by hand and without its marker it does not pass for a model.
    (partial / "INCOMPLETE").unlink()
    with pytest.raises(MMJaxError, match="half-written"):
        opening.open_pretrained(partial.rename(tmp_path / "m"))


def test_newer_format_is_refused(params, tmp_path):
    folder = written(params, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["mmjax"]["format"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MMJaxError, match=r"format 99.*upgrade"):
        opening.open_pretrained(folder)


def test_damaged_config_is_named(params, tmp_path):
    folder = written(params, tmp_path / "m")
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert opening.open_pretrained(folder).kind == "mmjax"  # as an editor on Windows saves it
    (folder / "config.json").write_text("{")
    with pytest.raises(MMJaxError, match=r"config\.json: not a JSON object"):
        opening.open_pretrained(folder)


def test_host_memory_does_not_grow_with_the_model(tmp_path):
    """Convert and export 150 MB in a process that holds a few pieces of 8 MB."""
    decoder = DecoderConfig(
        vocab_size=1024, d_model=512, num_layers=24, num_heads=8, num_kv_heads=8, head_dim=64
    )
    config = dataclasses.replace(
        tiny.CONFIG, decoder=dataclasses.replace(decoder, d_mlp=2048, max_positions=64)
    )
    family = registry.family("fuyu")
    ours = {k: v.shape for k, v in pretrained.abstract_params(family, config).items()}
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    at, header = 0, {}
    for key, shape in R.expected(family.weights.rules(config), ours).items():
        end = at + 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    assert at > 150e6
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # zeros that take no space
    script = """
import resource, sys
from convert_weights import to_hf, to_jax
from mmjax.models import pretrained, opening
from mmjax.parallel.mesh import use
from mmjax.weights import rules
rules.PIECE_BYTES = 8 * 2**20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hub, jax_folder, back = sys.argv[1:]
opened = opening.open_pretrained(hub)
with use():
    pretrained.abstract_params(opened.family, opened.config)
start = peak()
to_jax.main([hub, jax_folder])
to_hf.main([jax_folder, back])
print(peak() - start)
"""
    folders = [str(folder), str(tmp_path / "jax"), str(tmp_path / "back")]
    done = subprocess.run(
        [sys.executable, "-c", script, *folders],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    grown = int(done.stdout.split()[-1]) * 1024
    assert grown < 8 * 8 * 2**20
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 150e6
