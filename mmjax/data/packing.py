"""Packing: lay the tokens, patches and targets of several samples into one static shape.

Samples share a row without seeing one another: each has its own segment id and positions that
start at 0; ``visual_index`` and ``target_index`` are shifted to where the sample's patches and
tokens came to stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mmjax.types import BadSample, Batch, Example, MMJaxError


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static shape of a batch: rows, and what each row holds."""

    rows: int
    seq_len: int
    max_patches: int
    max_targets: int

    def __post_init__(self) -> None:
        """Raise MMJaxError for a shape that holds nothing; text alone needs no patches."""
        for name in ("rows", "seq_len", "max_targets"):
            if getattr(self, name) < 1:
                said = "batch_size" if name == "rows" else name
                raise MMJaxError(f"{said} is {getattr(self, name)}; give 1 or more")
        if self.max_patches < 0:
            raise MMJaxError(f"max_patches is {self.max_patches}; give 0 or more")

    def check(self, example: Example, name: str = "sample") -> None:
        """Raise BadSample when an example fits into no row at all, or has nothing to learn."""
        sizes = example_sizes(example)
        if sizes[2] == 0:
            raise BadSample("empty_answer", f"{name}: not one token of it is a training target")
        limits = (
            ("too_long", sizes[0], "tokens", self.seq_len, "seq_len"),
            ("too_many_patches", sizes[1], "image patches", self.max_patches, "max_patches"),
            ("too_many_targets", sizes[2], "target tokens", self.max_targets, "max_targets"),
        )
        for reason, size, what, limit, option in limits:
            if size > limit:
                raise BadSample(
                    reason,
                    f"{name}: {size} {what}, and a row holds {limit}; raise {option} or lower "
                    "the resolution",
                )


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an example came from; travels on the host beside the batch.

    source: its number in the mixture; name: that source's name; id: the record's own.
    images: how many the record has.
    """

    source: int
    name: str
    id: str
    images: int = 0


def example_sizes(example: Example) -> tuple[int, int, int]:
    """Return how many tokens, patches and targets an example needs."""
    return len(example["tokens"]), len(example["patches"]), len(_targets(example))


class BatchBuilder:
    """Fill one batch, sample by sample, each into the row where it leaves the least room.

    samples_per_row: 1 puts every sample into a row of its own (right-padded, no packing).
    origins: of the examples that have one, row by row.
    """

    def __init__(self, shape: BatchShape, samples_per_row: int | None = None):
        self.shape = shape
        self.samples_per_row = samples_per_row or shape.seq_len
        self.used = np.zeros((shape.rows, 3), np.int64)  # tokens, patches, targets of each row
        self.samples = np.zeros(shape.rows, np.int64)
        self.origins: list[list[Origin]] = [[] for _ in range(shape.rows)]
        self._limits = np.array([shape.seq_len, shape.max_patches, shape.max_targets])
        self._batch: Batch | None = None

    def __bool__(self) -> bool:
        return self._batch is not None

    def try_add(self, example: Example) -> bool:
        """Add an example where it fits best; False, and nothing changed, if no row has room."""
        free = self._limits - self.used - example_sizes(example)
        fits = (free >= 0).all(1) & (self.samples < self.samples_per_row)
        if not fits.any():
            return False
        self.add(example, int(np.where(fits, free[:, 0], np.iinfo(np.int64).max).argmin()))
        return True

    def add(self, example: Example, row: int) -> None:
        """Write an example behind what the row already holds; the caller knows that it fits.

        Raises MMJaxError where grey levels and normalised pixels come together.
        """
        if self._batch is None:
            self._batch = empty_batch(self.shape, example["patches"])
        batch = self._batch
        start, first_patch, first_target = self.used[row]
        targets = _targets(example)
        tokens, patches = len(example["tokens"]), len(example["patches"])
        if patches and batch["patches"].dtype != example["patches"].dtype:
            self._take_dtype(example["patches"].dtype)
        span = slice(start, start + tokens)
        batch["tokens"][row, span] = example["tokens"]
        batch["positions"][row, span] = example["positions"]
        visual = example["visual_index"]
        batch["visual_index"][row, span] = np.where(visual >= 0, visual + first_patch, -1)
        batch["segment_ids"][row, span] = self.samples[row] + 1
        batch["patches"][row, first_patch : first_patch + patches] = example["patches"]
        places = slice(first_target, first_target + len(targets))
        batch["target_index"][row, places] = targets + start
        origin = example.get("origin")
        batch["target_source"][row, places] = 0 if origin is None else origin.source
        if origin is not None:
            self.origins[row].append(origin)
        self.used[row] += (tokens, patches, len(targets))
        self.samples[row] += 1

    def _take_dtype(self, dtype: np.dtype) -> None:
        """Keep patches in another dtype; raises MMJaxError where patches stand in the batch."""
        patches = self._batch["patches"]
        if self.used[:, 1].any():
            raise MMJaxError(
                f"a batch holds patches of {patches.dtype} and an example brings {dtype}: uint8 is "
                "grey levels, floats are normalised; give all images in one of these ways"
            )
        self._batch["patches"] = patches.astype(dtype)

    def batch(self) -> Batch:
        """Return the batch as filled so far; rows without a sample are all padding."""
        if self._batch is None:
            raise ValueError("no example was added")
        return self._batch


def pack(examples: Sequence[Example], shape: BatchShape) -> Batch:
    """Pack examples into one batch; raises ValueError if they do not all fit."""
    builder = BatchBuilder(shape)
    for i, example in enumerate(examples):
        if not builder.try_add(example):
            raise ValueError(f"example {i} of {len(examples)} does not fit into {shape}")
    return builder.batch()


def _targets(example: Example) -> np.ndarray:
    """Return where the targets are; nothing stands before a first token to predict it from."""
    places = np.flatnonzero(example["loss_mask"])
    return places[places > 0]


def empty_batch(shape: BatchShape, patches: np.ndarray) -> Batch:
    """Return a batch of padding; patches take their width and dtype from an example's."""
    rows, t = shape.rows, shape.seq_len
    return {
        "tokens": np.zeros((rows, t), np.int32),
        "positions": np.zeros((rows, t), np.int32),
        "visual_index": np.full((rows, t), -1, np.int32),
        "segment_ids": np.zeros((rows, t), np.int32),
        "patches": np.zeros((rows, shape.max_patches, patches.shape[-1]), patches.dtype),
        "target_index": np.full((rows, shape.max_targets), -1, np.int32),
        "target_source": np.full((rows, shape.max_targets), -1, np.int32),
    }
