"""Cases of the attention and loss suites, and their inputs. numpy alone, both frameworks read it.

Inputs are normal numbers, never zeros, which take less power and run faster.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bench.cases import Case

BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of the parity error by dtype: largest difference over largest value, of each output."""

PACKED = {4096: (700, 1600, 900, 896), 16384: (2340,) * 6 + (2344,), 64: (24, 40), 256: (96, 160)}
"""Lengths of the documents in a packed row, by the length of the row."""


def attention_cases(quick: bool, device: str) -> list[Case]:
    """Return causal cases over lengths and head dims, and packed ones; each in both passes.

    On a GPU what says most comes first: a suite may run out of time.
    """
    on_gpu = device == "gpu"
    if quick:
        shapes = [(256, 64, 0), (256, 64, 1)] if on_gpu else [(64, 16, 0), (64, 16, 1)]
    elif on_gpu:
        shapes = [(2048, 64, 0), (4096, 64, 0), (16384, 64, 0), (16384, 64, 1), (2340, 64, 0)]
        shapes += [(4096, 128, 0), (16384, 128, 0), (16384, 128, 1), (8192, 64, 0)]
    else:
        shapes = [(t, h, 0) for t in (1024, 4096) for h in (64, 32)] + [(4096, 64, 1)]
    return [
        _attention_case(t, h, PACKED[t] if packed else (), backward, quick, on_gpu)
        for t, h, packed in shapes
        for backward in (False, True)
    ]


def _attention_case(t, h, documents, backward, quick, on_gpu) -> Case:
    # On a GPU every case has about 16,384 tokens in 2,048 channels.
    # Calls follow each other without waiting: a short one would be timed with its dispatch.
    calls = 1 if quick or not on_gpu else 10 if t < 8192 else 3
    b, n = (1, 2) if quick else (16384 // t, 2048 // h) if on_gpu else (1, 8)
    options = {
        "b": b, "t": t, "n": n, "h": h, "documents": list(documents), "backward": backward,
        "dtype": "bfloat16" if on_gpu else "float32", "calls": calls,
    }  # fmt: skip
    target = rate_target = None
    if not quick and not on_gpu and backward and not documents:
        target = 0.8
    if not quick and on_gpu and not documents and h == 64 and t in (2048, 4096):
        # 250 forward and 210 backward; the backward pass does 2.5 times the forward's work.
        rate_target = 3.5 / (1 / 250 + 2.5 / 210) if backward else 250.0
    if documents:
        peers = ("block-diagonal mask", "a call for each document")
    else:
        peers = ("flash", "cudnn") if on_gpu else ("sdpa",)
    kind = f"packed {len(documents)} documents" if documents else "causal"
    return Case(
        "attention",
        f"T {t} batch {b}, {n} heads of {h}, {kind}, forward{' + backward' if backward else ''}",
        options,
        work=attention_flops(options) / (1e12 if on_gpu else 1e9),
        unit="TFLOP" if on_gpu else "GFLOP",
        bound=BOUNDS[options["dtype"]],
        impls=_implementations(t, documents) if on_gpu else ("xla",),
        peers=peers,
        target=target,
        rate_target=rate_target,
        device="gpu" if on_gpu else "cpu",
        seconds=90 if on_gpu else None,
    )


def _implementations(t: int, documents) -> tuple[str, ...]:
    """Return ours to try on a GPU; the row of one that cannot run there holds its reason."""
    plain = () if t > 4096 else ("xla",)  # seconds a call
    return ("triton", "mosaic", *(() if documents else ("cudnn",)), *plain)


def attention_flops(options: dict[str, Any]) -> int:
    """Count what the visible pairs of a case cost: 4 h forward (two matmuls), 10 h backward."""
    pairs = sum(m * (m + 1) // 2 for m in options["documents"] or [options["t"]])
    each = (14 if options["backward"] else 4) * options["h"]
    return each * pairs * options["b"] * options["n"]


def attention_inputs(case: Case) -> dict[str, np.ndarray]:
    """Make q, k, v and the gradient of the output, float32[b, t, n, h], and segment_ids [b, t]."""
    o = case.options
    names, shape = ("q", "k", "v", "cotangent"), (o["b"], o["t"], o["n"], o["h"])
    lengths = o["documents"] or [o["t"]]
    row = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    found = dict(zip(names, _normal((shape,) * 4), strict=True))
    return found | {"segment_ids": np.tile(row, (o["b"], 1))}


def loss_cases(quick: bool, device: str) -> list[Case]:
    """Return the loss on answers (a quarter of the tokens) and on every token."""
    on_gpu = device == "gpu"
    tokens, d, vocab = (2048, 256, 32768)
    if on_gpu:
        tokens, d, vocab = (8192, 4096, 262144)
    if quick:
        tokens, d, vocab = (64, 32, 512)
    dtype = "bfloat16" if on_gpu else "float32"
    found = []
    for name, targets in (("answers", tokens // 4), ("every token", tokens)):
        found.append(
            Case(
                "loss",
                f"{tokens} tokens, width {d}, vocabulary {vocab}, loss on {name}",
                {"tokens": tokens, "d": d, "vocab": vocab, "targets": targets, "dtype": dtype},
                work=tokens,
                unit="tokens",
                bound=BOUNDS[dtype],
                peers=("all logits", "gathered logits") if targets < tokens else ("all logits",),
                device="gpu" if on_gpu else "cpu",
                seconds=150 if on_gpu else None,
            )
        )
    return found


def loss_inputs(case: Case) -> dict[str, np.ndarray]:
    """Make hidden states float32[tokens, d], a head [d, vocab], and targets with their places.

    index: int32[targets], rows of ``hidden`` that are supervised; labels: int32[targets].
    """
    o = case.options
    hidden, head = _normal(((o["tokens"], o["d"]), (o["d"], o["vocab"])))
    hidden = hidden * np.float32(o["d"] ** -0.5)  # so that logits are about 1
    rng = np.random.default_rng(4)
    index = np.sort(rng.choice(o["tokens"], o["targets"], replace=False)).astype(np.int32)
    labels = rng.integers(0, o["vocab"], o["targets"]).astype(np.int32)
    return {"hidden": hidden, "head": head, "index": index, "labels": labels}


@functools.lru_cache(maxsize=1)
def _normal(shapes: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, ...]:
    """Draw float32 arrays of these shapes; cases that follow each other share them, unchanged."""
    rng = np.random.default_rng(3)
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def attention_sample(array: Any) -> Any:
    """Return what is compared of a framework's array [b, t, n, h]: the first and the last head."""
    return array[:, :, :: max(1, array.shape[2] - 1)]


def loss_sample(head_gradient: Any) -> Any:
    """Return what is compared of the head's gradient [d, v]: at most about 4,096 columns of it."""
    return head_gradient[:, :: max(1, head_gradient.shape[1] // 4096)]
