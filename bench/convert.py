"""python -m bench.convert: memory and time of a conversion there and back, at any size.

    python -m bench.convert                    Fuyu-8B as published: 9.4 B parameters, 18.8 GB
    python -m bench.convert --layers 2         its embeddings and two of its layers

A checkpoint with random bfloat16 weights is written in the hub's layout, converted by
``convert_weights.to_jax`` and written back by ``convert_weights.to_hf``, each in a process of its
own whose peak resident memory the kernel reports. Every tensor that comes back is compared with
the one that went in. It needs room for three checkpoints in --dir.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench import environment, ours, report
from mmjax.cli import Parser
from mmjax.models import pretrained, registry
from mmjax.parallel.mesh import use
from mmjax.weights import rules, writer
from mmjax.weights.reader import open_reader

TINY = dict(vocab_size=512, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_mlp=128)
BLOCK = 2**20
PIECE = 2**26


class RandomWeights:
    """Parameters as a Reader: slices of one block of random numbers, made when they are read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.files: list[Path] = []
        self.shapes = shapes
        draws = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * 0.02
        self.block = draws.astype(ml_dtypes.bfloat16)

    def keys(self) -> Iterable[str]:
        return self.shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.shapes[key]

    def dtype(self, key: str) -> np.dtype:
        return self.block.dtype

    def read(self, key: str, index: Any = ...) -> np.ndarray:
        shape = np.broadcast_to(np.int8(0), self.shapes[key])[index].shape
        # Every slice begins elsewhere in the block, so that exchanged layers do not go unnoticed.
        start = zlib.crc32(f"{key} {index}".encode()) % BLOCK
        return np.resize(np.roll(self.block, -start), math.prod(shape)).reshape(shape)


def write_checkpoint(folder: Path, **decoder: int) -> int:
    """Write a Fuyu checkpoint in the hub's layout; returns its bytes.

    decoder: sizes other than the published ones.
    """
    fuyu = registry.family("fuyu")
    config = fuyu.Config()
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))
    with use():
        abstract = pretrained.abstract_params(fuyu, config)
    source = RandomWeights({name: tuple(leaf.shape) for name, leaf in abstract.items()})
    tensors = rules.export(fuyu.weights.rules(config), source)
    folder.mkdir()
    writer.write_shards(folder, tensors)
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "bfloat16"}))
    return sum(t.nbytes for t in tensors)


# The child tells its own peak: what the kernel tells a parent (ru_maxrss) begins with the size that
# the parent had when it forked.
CHILD = """
import pathlib, runpy, sys
report = pathlib.Path(sys.argv.pop(1))
sys.argv.pop(0)
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    report.write_text(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def run(module: str, *arguments: str) -> dict[str, float]:
    """Run a command of convert_weights; returns its seconds and peak resident memory in GB."""
    with tempfile.TemporaryDirectory() as folder:
        peak = Path(folder) / "peak"
        command = [sys.executable, "-c", CHILD, str(peak), module, *arguments]
        begun = time.perf_counter()
        subprocess.run(command, cwd=environment.ROOT, check=True)
        seconds = time.perf_counter() - begun
        return {
            "seconds": round(seconds, 1),
            "peak_gb": round(int(peak.read_text()) * 1024 / 1e9, 3),
        }


def different(a: Path, b: Path) -> list[str]:
    """Name the tensors of two checkpoints that are not equal bit for bit."""
    one, other = open_reader(a), open_reader(b)
    names = set(one.keys()) ^ set(other.keys())
    for key in sorted(set(one.keys()) & set(other.keys())):
        shape = one.shape(key)
        rows = max(1, PIECE // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            cut = slice(start, start + rows)
            if not np.array_equal(one.read(key, cut), other.read(key, cut)):
                names.add(key)
    return sorted(names)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert there and back; returns 1 when a tensor changed."""
    parser = Parser("python -m bench.convert", __doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument(
        "--dir", type=Path, help="where the checkpoints go, default a temporary one"
    )
    parser.add_argument("--out", type=Path, help="append the row to this file")
    args = parser.read(argv)
    sizes = {"num_layers": args.layers, **(TINY if args.quick else {})}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        theirs, converted, back = (Path(folder) / name for name in ("hub", "mmjax", "back"))
        begun = time.perf_counter()
        nbytes = write_checkpoint(theirs, **sizes)
        written = round(time.perf_counter() - begun, 1)
        print(f"wrote {nbytes / 1e9:.2f} GB in {written} s", file=sys.stderr, flush=True)
        row = {
            "suite": "convert",
            "layers": args.layers,
            "quick": args.quick,
            "parameters": nbytes // 2,
            "checkpoint_gb": round(nbytes / 1e9, 2),
            "write_s": written,
            "to_jax": run("convert_weights.to_jax", str(theirs), str(converted)),
            "to_hf": run("convert_weights.to_hf", str(converted), str(back)),
            "changed": different(theirs, back),
            "command": "python -m bench.convert "
            + " ".join(sys.argv[1:] if argv is None else argv),
        }
    row["env"] = environment.describe({"ours": ours.versions()})
    print("\n".join(report.convert_table([row])))
    if args.out:
        with args.out.open("a") as out:
            print(json.dumps(row), file=out)
    return int(bool(row["changed"]))


if __name__ == "__main__":
    sys.exit(main())
