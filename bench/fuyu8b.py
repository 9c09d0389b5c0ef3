"""The train_8b and decode_8b suites: Fuyu-8B at its full size, for a GPU of 80 GB or more.

numpy alone, both sides read it. Weights are random and made on the device, each side its own, so
results are compared on a small model that both read, in float32: at the start of every case.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bench import cases
from bench.cases import TINY, Case, Size

FUYU_8B = Size(vocab=262144, d=4096, layers=36, heads=64, mlp=16384, patch=30)
SMALL = Size(vocab=2048, d=512, layers=2, heads=8, mlp=1024, patch=30)
"""What is compared where the case's own model has its full size; heads of 64, as in Fuyu-8B."""

RANK, ALPHA, RATE = 16, 32, 1e-4
MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""What has adapters, in the peer's names."""
COMPARED = MODULES[1:]
"""What has adapters where results are compared: q, k and v are three maps here and one there."""

STRONG = "cuDNN attention, gathered logits, compiled layers"
SDPA, EAGER = "sdpa", "eager attention, checkpointing"
DYNAMIC, STATIC = "dynamic cache", "static cache, compiled"

LONG, DOCUMENT, DOCUMENTS = 8192, 2340, 3  # both sides at once fit into the memory of an H200
SECONDS = 300
"""The most that a side may take over one request."""


def train_cases(quick: bool, device: str) -> list[Case]:
    """Return adapters at 2,400 tokens and packed, and all weights; none on a CPU but quick ones."""
    if device != "gpu" and not quick:
        return []
    t, b, targets = (48, 2, 8) if quick else (2400, 2, 128)
    few, every = {"targets": targets}, {"targets": t - 1}
    adapters, whole = {"trained": "lora"}, {"trained": "all"}
    rows = {"b": b, "t": t}
    found = [
        _train(f"adapters, T {t} batch {b}, loss on answers", rows | few | adapters, quick, device,
               peers=(STRONG, SDPA, EAGER), target=1.2, rate_target=14_000),
        _train(f"adapters, T {t} batch {b}, loss on every token", rows | every | adapters, quick,
               device, peers=(SDPA,), target=1.2, rate_target=12_000),
    ]  # fmt: skip
    documents, length, row = (3, 20, 64) if quick else (DOCUMENTS, DOCUMENT, LONG)
    packed = {"b": documents, "t": length, "row": row, "targets": targets}
    found += [
        _train(f"adapters, {documents} x {length} tokens packed into {row}", packed | adapters,
               quick, device, peers=(STRONG,), target=1.2),
    ]  # fmt: skip
    alone = dataclasses.replace(
        _train(f"all weights, T {t} batch {b}, Adafactor", rows | few | whole, quick, device,
               peers=(None,), rate_target=8_500),
        device="gpu alone" if device == "gpu" else device,
    )  # fmt: skip
    return [*found, alone]


def _train(name: str, options: dict[str, Any], quick: bool, device: str, **about: Any) -> Case:
    if quick:
        about = {"peers": about["peers"]}
    return Case(
        "train_8b",
        name,
        options | {"dtype": "bfloat16" if device == "gpu" else "float32"},
        work=options["b"] * options["t"],
        unit="tokens",
        bound=1e-4,
        size=TINY if quick else FUYU_8B,
        device=device,
        seconds=None if quick else SECONDS,
        **about,
    )


def decode_cases(quick: bool, device: str) -> list[Case]:
    """Return a prefill and greedy answers behind an image of 1080 x 1920 pixels."""
    if device != "gpu" and not quick:
        return []
    rows, cols, new = (2, 3, 6) if quick else (36, 64, 128)
    shape = {"rows": rows, "cols": cols, "dtype": "bfloat16" if device == "gpu" else "float32"}
    prompt = rows * (cols + 1) + 24
    found = []
    for b, count, peers, rate in (
        (1, 1, (DYNAMIC,), None),
        (1, new, (DYNAMIC, STATIC), 180.0),
        (8, new, (DYNAMIC,), None),
    ):
        found.append(
            Case(
                "decode_8b",
                f"batch {b}, {prompt:,} tokens of prompt, {count} new",
                shape | {"b": b, "new": count},
                work=b * count,
                unit="tokens",
                bound=0,  # the same tokens
                size=TINY if quick else FUYU_8B,
                peers=peers[:1] if quick else peers,
                target=None if quick or count == 1 else 2.0,
                rate_target=None if quick else rate,
                device=device,
                seconds=None if quick else SECONDS,
            )
        )
    return found[1:2] if quick else found


def compared(case: Case) -> Case:
    """Return the case in small, of which both sides' results are compared."""
    o = dict(case.options)
    if case.size != TINY:
        o |= {"rows": 6, "cols": 8} if case.suite == "decode_8b" else {"t": 160, "targets": 24}
    if "row" in o:
        o["row"] = (o["b"] + 1) * o["t"]
    return dataclasses.replace(
        case, options=o | {"dtype": "float32"}, size=small(case.size), device=case.device
    )


def small(size: Size) -> Size:
    """Return the size of the model in the folder that both sides read."""
    return TINY if size == TINY else SMALL


def train_batch(case: Case) -> dict[str, np.ndarray]:
    """Make the batch of a case: its rows, or all of them packed into one of ``row`` tokens."""
    rows = cases.train_batch(case)
    if "row" not in case.options:
        return rows
    b, t, length = (case.options[k] for k in ("b", "t", "row"))
    patches, used = rows["patches"].shape[1], b * t
    first = np.arange(b, dtype=np.int32)[:, None]
    rows["segment_ids"] = rows["segment_ids"] + first
    shifted = rows["visual_index"] + first * patches
    rows["visual_index"] = np.where(rows["visual_index"] < 0, -1, shifted).astype(np.int32)
    rows["target_index"] = rows["target_index"] + first * t
    rows["patches"] = rows["patches"].reshape(1, b * patches, -1)
    empty = {"visual_index": -1}
    return {
        name: x
        if name == "patches"
        else x.reshape(1, -1)
        if name == "target_index"
        else np.pad(
            x.reshape(1, used), ((0, 0), (0, length - used)), constant_values=empty.get(name, 0)
        )
        for name, x in rows.items()
    }
