"""What is measured: model sizes, cases and their inputs. numpy alone, both frameworks read it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

IMAGE, EOS = 5, 7
"""Token ids of a patch and of the end; drawn texts hold neither."""

PROMPT = "Describe what the picture shows and read the small sign.\n"
"""The text of every case of the input suite."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A Fuyu model: vocabulary, width, layers, heads, mlp and patch side in pixels."""

    vocab: int = 4096
    d: int = 256
    layers: int = 6
    heads: int = 8
    mlp: int = 1024
    patch: int = 30

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.patch**2 * 3


@dataclasses.dataclass(frozen=True)
class TowerSize:
    """A language model with a vision tower: widths, layers, heads; image, patch: pixels a side."""

    vocab: int = 4096
    d: int = 256
    layers: int = 6
    heads: int = 8
    image: int = 112
    patch: int = 14
    tower_d: int = 256
    tower_layers: int = 4
    tower_heads: int = 4
    positions: int = 512


@dataclasses.dataclass(frozen=True)
class FlamingoSize(TowerSize):
    """A Flamingo on an MPT, with a gated block before every so many layers.

    The resampler is as published, 6 layers and 64 latents, and as wide as the tower. The last three
    of the vocabulary are <|endofchunk|>, <image> and padding.
    """

    every: int = 2

    @property
    def eoc(self) -> int:
        """Token id of <|endofchunk|>; text has the ids below."""
        return self.vocab - 3

    @property
    def media(self) -> int:
        """Token id of <image>."""
        return self.vocab - 2

    @property
    def pad(self) -> int:
        """Token id of the filling."""
        return self.vocab - 1


@dataclasses.dataclass(frozen=True)
class BunnySize(TowerSize):
    """A Bunny on a Phi, and a SigLIP tower of which all layers but one run.

    mlp: width of the language model's. rank: of the adapters.
    """

    mlp: int = 1024
    rank: int = 16

    @property
    def image_tokens(self) -> int:
        """Tokens of the stream that an image takes."""
        return (self.image // self.patch) ** 2


SIZES = {"flamingo": FlamingoSize, "bunny": BunnySize}
"""The suites whose models are no Fuyus."""

UNROLLED = "scan_unroll of all layers"
TINY = Size(vocab=512, d=64, layers=2, heads=4, mlp=128, patch=8)


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is timed on both sides.

    suite: one of ``bench.suites.SUITES``. options: sizes of the work; see the suites' sides. work:
    what one repetition does, in ``unit``. peers: variants of the peer, None for a time without one;
    no variants mean that nothing is timed, the suite's side answers with what it found. impls:
    variants of our own; the first is what mmjax does by default. bound: of the parity error.
    target: of the ratio, or None. rate_target: of our own work per second, or None. device: what
    both sides run on, one of
    ``bench.sides.DEVICES``. seconds: the most that a side may take over one request, such as to
    build the case or to measure a turn, or None; what hangs then costs its own row alone.
    """

    suite: str
    name: str
    options: dict[str, Any]
    work: float
    unit: str
    bound: float
    size: Size | FlamingoSize | BunnySize = Size()
    peers: tuple[str | None, ...] = ("",)
    impls: tuple[str, ...] = ("",)
    target: float | None = None
    rate_target: float | None = None
    threads: int = 0  # 0: all cores
    device: str = "cpu"
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        return cls(**{**data, "size": SIZES.get(data["suite"], Size)(**data["size"])})


def train_cases(quick: bool, device: str) -> list[Case]:
    """Return the cases of the train suite; they run on the CPU."""
    found = []
    for t, b, targets in [(64, 2, 8)] if quick else [(512, 4, 32), (2048, 1, 128)]:
        for loss in ("answers",) if quick else ("answers", "every token"):
            options = {"t": t, "b": b, "targets": targets if loss == "answers" else t - 1}
            found.append(
                Case(
                    "train",
                    f"T {t} batch {b}, loss on {loss}",
                    options,
                    work=b * t,
                    unit="tokens",
                    bound=1e-3,
                    size=TINY if quick else Size(),
                    # The second peer is told to compute no logits but the ones the loss needs.
                    peers=("sdpa", "sdpa, gathered logits") if loss == "answers" else ("sdpa",),
                    impls=("",) if quick or loss != "answers" else ("", UNROLLED),
                    target=1.5 if loss == "answers" else 1.0 if t <= 512 else 0.8,
                )
            )
    return found


def decode_cases(quick: bool, device: str) -> list[Case]:
    """Return the cases of the decode suite; they run on the CPU."""
    new = 8 if quick else 128
    return [
        Case(
            "decode",
            f"batch {b}, {new} new tokens",
            {"b": b, "new": new, "rows": 2 if quick else 12, "cols": 3 if quick else 16},
            work=b * new,
            unit="tokens",
            bound=0,  # the same tokens
            size=TINY if quick else Size(),
            peers=("sdpa",),
            target=3.0,
        )
        for b in ([2] if quick else [1, 8])
    ]


def input_cases(quick: bool, device: str) -> list[Case]:
    """Return the cases of the input suite; they run on the CPU."""
    sizes = [(120, 90), (2000, 300)] if quick else [(448, 448), (1024, 768), (2466, 1766)]
    found = []
    for threads in [0] if quick else [1, 0]:
        for width, height in sizes:
            resized = width > 1920 or height > 1080
            found.append(
                Case(
                    "input",
                    f"{width}x{height}{' resized' if resized else ''}, "
                    f"{'one core' if threads else 'all cores'}",
                    {"width": width, "height": height},
                    work=1,
                    unit="images",
                    bound=1 if resized else 0,  # grey levels; tokens must be equal
                    impls=("uint8 patches", "float patches"),
                    peers=("Pillow", "torchvision"),
                    target=1.5 if resized else 5.0,
                    threads=threads,
                )
            )
    return found


def train_batch(case: Case) -> dict[str, np.ndarray]:
    """Make a batch of ``mmjax.types.Batch``: three quarters image, targets at the end of each row.

    All rows have their targets at the same places, so that a peer can slice its hidden states.
    """
    b, t, targets = (case.options[k] for k in ("b", "t", "targets"))
    rng = np.random.default_rng(0)
    patches = t * 3 // 4 - 1
    tokens = text(rng, case.size, (b, t))
    tokens[:, 1 : 1 + patches] = IMAGE
    visual = np.full((b, t), -1, np.int32)
    visual[:, 1 : 1 + patches] = np.arange(patches)
    return {
        "tokens": tokens,
        "positions": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "visual_index": visual,
        "segment_ids": np.ones((b, t), np.int32),
        "patches": rng.integers(0, 256, (b, patches, case.size.patch_dim), np.uint8),
        "target_index": np.tile(np.arange(t - targets, t, dtype=np.int32), (b, 1)),
    }


def decode_prompts(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Make prompts int32[b, t] with one image in front, and their patches float32[b, p, pixels]."""
    b, rows, cols = (case.options[k] for k in ("b", "rows", "cols"))
    rng = np.random.default_rng(1)
    grid = np.full((b, rows, cols + 1), IMAGE, np.int32)
    grid[:, :, -1] = 6  # a newline closes each row of patches
    tokens = np.concatenate([grid.reshape(b, -1), text(rng, case.size, (b, 24))], axis=1)
    patches = rng.integers(0, 256, (b, rows * cols, case.size.patch_dim), np.uint8)
    return tokens, normalised(patches)


def picture(case: Case) -> np.ndarray:
    """Make a photograph-like picture, uint8[h, w, 3]: smooth shapes under a little noise."""
    width, height = case.options["width"], case.options["height"]
    rng = np.random.default_rng(2)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = [120 + 90 * np.sin(x / (40 + 9 * c) + c) * np.cos(y / (57 - 7 * c)) for c in range(3)]
    noise = rng.integers(-12, 13, (height, width, 3))
    return np.clip(np.stack(planes, -1) + noise, 0, 255).astype(np.uint8)


def normalised(levels: np.ndarray) -> np.ndarray:
    """Turn grey levels into Fuyu's float pixels."""
    return (levels.astype(np.float32) / 255.0 - 0.5) / 0.5


def text(rng: np.random.Generator, size: Size | BunnySize, shape: tuple[int, ...]) -> np.ndarray:
    """Draw token ids of text, int32."""
    return rng.integers(8, size.vocab, shape).astype(np.int32)
