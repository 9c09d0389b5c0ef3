"""python -m bench.pipeline: records a second and memory of the training pipeline, beside torch.

    python -m bench.pipeline                     100,000 records of mixed sizes
    python -m bench.pipeline --records 10000     a tenth of them

Conversations and JPEG pictures are made, then drawn in three turns, each in a process of its own
with the same number of data workers: ours over a tenth of the records, transformers' FuyuProcessor
in a torch DataLoader over the first --peer-records of the same order, ours over all. What both
sides make of 64 records is compared first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import environment, ours, records, report
from bench.runner import BenchError, parity
from mmjax.cli import Parser

TARGET = 5.0
SEED = 0
SHAPE = {"seq_len": 8192, "max_patches": 7680, "max_targets": 2048, "batch_size": 8}
QUICK_SHAPE = {"seq_len": 128, "max_patches": 112, "max_targets": 64, "batch_size": 2}
QUICK = {"records": 96, "pictures": 12, "peer_records": 12, "compared": 6}


def run(side: str, folder: Path, name: str, **spec: Any) -> dict[str, Any]:
    """Run one turn of one side in a process of its own; returns its figures.

    Raises BenchError when it fails; its own message went to stderr.
    """
    answer = folder / f"{name}.answer.json"
    wanted = folder / f"{name}.spec.json"
    wanted.write_text(json.dumps({"folder": str(folder), "seed": SEED, "parity": False, **spec}))
    command = [sys.executable, "-m", "bench.pipeline_sides", side, str(wanted), str(answer)]
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
    code = subprocess.run(command, cwd=environment.ROOT, env=os.environ | settings).returncode
    if code:
        raise BenchError(f"the turn {name!r} ended with code {code}; its message stands above")
    found = json.loads(answer.read_text())
    rates = f"{found['images_per_s']:g} images/s, {found['images_per_core_s']:g} a core second"
    print(f"{name}: {found['images']} images, {rates}", file=sys.stderr, flush=True)
    return found


def order(folder: Path, count: int) -> list[dict[str, Any]]:
    """Return the records of the first ``count`` draws of our training order."""
    from mmjax.data.mixture import Mixture
    from mmjax.data.pipeline import draw_records
    from mmjax.data.sources import JsonSource

    file = folder / "records.json"
    every = json.loads(file.read_text())
    draws = draw_records(Mixture.of(JsonSource(file)), SEED, epochs=1)
    return [every[draws[place][1]] for place in range(count)]


def compare(one: Path, other: Path) -> dict[str, float]:
    """Return the largest differences of two sides' outputs: see ``runner.parity``."""
    with np.load(one) as mine, np.load(other) as theirs:
        if set(mine.files) != set(theirs.files):
            return {"tokens": float("inf"), "levels": float("inf")}
        worst = {"tokens": 0.0, "levels": 0.0}
        for key in mine.files:
            kind = key.rpartition(".")[2]
            a, b = ({kind: np.asarray(x[key], np.float32)} for x in (mine, theirs))
            worst[kind] = max(worst[kind], parity("input", a, b)[kind])
    return worst


def growth(memory: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return how much memory grew from 40-60 % of the records to the last 20 %, by medians.

    Batches come and go, so that a single look tells no more than one of them. ``own`` is without
    shared memory, where batches wait for the trainer: their number is bounded, and fills up early
    on, when one worker first gets ahead. ``shm_peak_mb`` is the most that waited.
    """
    early = [m for m in memory if 0.4 <= m["share"] <= 0.6]
    late = [m for m in memory if m["share"] > 0.8]
    found = {}
    for prefix, kinds in (("", ("own_mb", "shm_mb")), ("own_", ("own_mb",))):
        before, after = (
            statistics.median(sum(m[kind] for kind in kinds) for m in part)
            for part in (early, late)
        )
        found |= {
            f"{prefix}early_mb": round(before, 1),
            f"{prefix}late_mb": round(after, 1),
            f"{prefix}growth_mb": round(after - before, 1),
            f"{prefix}growth": round(after / before - 1, 4),
        }
    return found | {"shm_peak_mb": max(m["shm_mb"] for m in memory)}


def settled(turn: dict[str, Any]) -> float:
    """Return the images a core second of a turn behind its first batch: without the start."""
    return (turn["images"] - turn["first_images"]) / max(turn["cpu_s"] - turn["first_cpu_s"], 0.01)


def decode_ms(folder: Path, count: int = 200) -> float:
    """Return the milliseconds of one core in which Pillow decodes a picture, on average."""
    files = sorted((folder / "pictures").iterdir())[:count]
    begun = time.process_time()
    for file in files:
        with Image.open(file) as image:
            image.load()
    return round((time.process_time() - begun) / len(files) * 1e3, 2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m bench.pipeline", __doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=2000, help="different JPEG files")
    parser.add_argument("--workers", type=int, default=environment.cores(), help="of each side")
    parser.add_argument("--rows", type=int, default=SHAPE["batch_size"], help="rows of a batch")
    parser.add_argument("--peer-records", type=int, default=1500)
    parser.add_argument("--quick", action="store_true", help="a few small records: does it run?")
    parser.add_argument("--dir", type=Path, help="where records go, default a temporary folder")
    parser.add_argument("--out", type=Path, help="append the row to this file")
    args = parser.read(argv)
    args.shape, args.sizes, args.compared = SHAPE | {"batch_size": args.rows}, records.Sizes(), 64
    if args.quick:
        args.shape, args.sizes = QUICK_SHAPE, records.QUICK
        vars(args).update(QUICK)
    return args


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the records and take the turns; returns the row without its environment."""
    size = records.write(folder, args.records, args.pictures, args.sizes)
    print(f"made {size}", file=sys.stderr, flush=True)
    first = order(folder, args.peer_records)
    (folder / "peer.json").write_text(json.dumps(first))
    (folder / "parity.json").write_text(json.dumps(first[: args.compared]))
    mine = {"workers": args.workers, "shape": args.shape}
    short = run("ours", folder, "ours-tenth", images=-(-args.records // 10), parity=True, **mine)
    peer = run("peer", folder, "peer", images=len(first), parity=True, workers=args.workers)
    full = run("ours", folder, "ours", images=args.records, **mine)
    errors = compare(folder / "ours-tenth.answer.npz", folder / "peer.answer.npz")
    turns = [settled(turn) for turn in (short, full)]
    other = max(turn["other_cores"] for turn in (short, peer, full))
    return {
        "suite": "pipeline",
        "quick": args.quick,
        **size,
        "workers": args.workers,
        "shape": args.shape,
        "decode_ms": decode_ms(folder),
        "ours": full | growth(full["memory"]),
        "ours_tenth": short,
        "peer": peer | growth(peer["memory"]),
        "target": TARGET,
        "ratio": round(full["images_per_s"] / peer["images_per_s"], 2),
        "ratio_core": round(full["images_per_core_s"] / peer["images_per_core_s"], 2),
        "noise": round(abs(turns[0] - turns[1]) / max(turns), 3),
        "other_cores": other,
        "loaded": other > environment.QUIET,
        "compared": args.compared,
        "parity_errors": errors,
        "parity_ok": max(errors.values()) <= 1e-9,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 1 when the two sides do not make the same of the same records."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        row = measure(args, Path(folder))
    row["command"] = "python -m bench.pipeline " + " ".join(sys.argv[1:] if argv is None else argv)
    row["command"] = row["command"].strip()
    row["env"] = environment.describe({"ours": ours.versions(), "peer": _peer_versions()})
    print("\n".join(report.pipeline_lines([row])))
    if args.out:
        with args.out.open("a") as out:
            print(json.dumps(row), file=out)
    return int(not row["parity_ok"])


def _peer_versions() -> dict[str, str]:
    from bench import torch_peer

    return torch_peer.versions()


if __name__ == "__main__":
    sys.exit(main())
