"""The flamingo suite: a train step, and generation. numpy alone, both sides read it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.cases import Case, FlamingoSize

TINY = FlamingoSize(
    vocab=512, d=64, layers=2, heads=4, every=1, image=28, tower_d=64, tower_layers=1, tower_heads=2
)
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
"""The defaults of OpenFlamingo's training script."""
NO_CACHE, CACHE = "use_cache=False, its default", "use_cache=True"
"""Variants of the peer: unless told, MPT computes all tokens again for each new one."""


def flamingo_cases(quick: bool, device: str) -> list[Case]:
    """Return the cases of the flamingo suite; they run on the CPU."""
    size, found = TINY if quick else FlamingoSize(), []
    for b, t, images in [(2, 32, 2)] if quick else [(4, 256, 3), (2, 128, 2)]:
        found.append(
            Case(
                "flamingo",
                f"train step, batch {b}, {t} tokens, {images} images each",
                {"kind": "train", "b": b, "t": t, "images": images},
                work=b * t,
                unit="tokens",
                bound=1e-3,
                size=size,
                peers=("its training loop",),
                target=1.2,
            )
        )
    new = 8 if quick else 64
    for b in [2] if quick else [1, 4]:
        found.append(
            Case(
                "flamingo",
                f"generation, batch {b}, {'3' if b == 1 else '2 or 3'} images, {new} new tokens",
                {"kind": "generate", "b": b, "new": new, "images": 3, "t": 24 if quick else 72},
                work=b * new,
                unit="tokens",
                bound=0,  # the same tokens
                size=size,
                peers=(NO_CACHE, CACHE),
                target=3.0,
            )
        )
    return found


def config_json(size: FlamingoSize) -> dict[str, Any]:
    """Return the config.json of a Flamingo on an MPT, in Otter's form."""
    ids = {"media_token_id": size.media, "eoc_token_id": size.eoc, "eos_token_id": size.eoc}
    return {
        "model_type": "flamingo",
        "cross_attn_every_n_layers": size.every,
        **ids,
        "text_config": {
            "model_type": "mpt",
            "vocab_size": size.vocab,
            "d_model": size.d,
            "n_heads": size.heads,
            "n_layers": size.layers,
            "max_seq_len": size.positions,
        },
        "vision_config": {
            "hidden_size": size.tower_d,
            "num_hidden_layers": size.tower_layers,
            "num_attention_heads": size.tower_heads,
            "intermediate_size": 4 * size.tower_d,
            "image_size": size.image,
            "patch_size": size.patch,
        },
    }


def train_batch(case: Case) -> dict[str, np.ndarray]:
    """Make a batch of ``mmjax.types.Batch``: rows of chunks, an image and the text that follows it.

    Targets are those of OpenFlamingo on MMC4: what stands behind an <image>, up to and with its
    <|endofchunk|>. Rows differ in where their images stand, so also in how many targets they have.
    """
    b, t, images = (case.options[k] for k in ("b", "t", "images"))
    rng, size = np.random.default_rng(0), case.size
    tokens = rng.integers(0, size.eoc, (b, t)).astype(np.int32)
    target = np.zeros((b, t), bool)
    chunk = t // images
    for row in range(b):
        for i in range(images):
            first = i * chunk + int(rng.integers(0, 6))
            last = (i + 1) * chunk - 1 - int(rng.integers(0, 4))
            tokens[row, first], tokens[row, last] = size.media, size.eoc
            target[row, first + 1 : last + 1] = True
    index = np.full((b, int(target.sum(1).max())), -1, np.int32)
    for row in range(b):
        index[row, : target[row].sum()] = np.flatnonzero(target[row])
    return {
        "tokens": tokens,
        "positions": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "visual_index": (np.cumsum(tokens == size.media, axis=1) - 1).astype(np.int32),
        "segment_ids": np.ones((b, t), np.int32),
        "patches": rng.integers(0, 256, (b, images, size.image**2 * 3), np.uint8),
        "target_index": index,
    }


def prompts(case: Case) -> list[dict[str, np.ndarray]]:
    """Make prompts as a processor would: solved examples, each behind its image, then the question.

    Every second row has one image less, and is shorter.
    """
    b, t, images = (case.options[k] for k in ("b", "t", "images"))
    rng, size = np.random.default_rng(1), case.size
    found = []
    for row in range(b):
        count, length = images - row % 2, t - 5 * (row % 2)
        tokens = rng.integers(0, size.eoc, length).astype(np.int32)
        starts = [i * (length // count) for i in range(count)]
        tokens[starts] = size.media
        tokens[[i - 1 for i in starts[1:]]] = size.eoc
        found.append(
            {
                "tokens": tokens,
                "positions": np.arange(length, dtype=np.int32),
                "loss_mask": np.zeros(length, bool),
                "visual_index": (np.cumsum(tokens == size.media) - 1).astype(np.int32),
                "patches": rng.integers(0, 256, (count, size.image**2 * 3), np.uint8),
            }
        )
    return found
