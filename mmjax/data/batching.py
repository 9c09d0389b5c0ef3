"""Evaluation batches: examples grouped by length into a few static shapes, right-padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mmjax.data.packing import BatchBuilder, BatchShape, example_sizes
from mmjax.types import Batch, Example, MMJaxError

Bucket = int | tuple[int, int]
"""Tokens of a row, or (tokens, patches); one number means as many patches as tokens."""


def bucket_batches(
    examples: Sequence[Example],
    batch_size: int,
    buckets: Sequence[Bucket],
    *,
    max_targets: int = 1,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield (index int32[b], batch) until every example was in one batch; one sample a row.

    index says which example stands in a row. A last batch that is not full repeats its first row,
    with index -1, so that every row is a real prompt. Each example goes into the first bucket it
    fits; shapes are those of the buckets, so at most one compile each. Raises MMJaxError naming an
    example that fits into none.
    """
    limits = sorted((b, b) if isinstance(b, int) else tuple(b) for b in buckets)
    groups: list[list[int]] = [[] for _ in limits]
    for i, example in enumerate(examples):
        tokens, patches, targets = example_sizes(example)
        fitting = (g for g, (t, p) in enumerate(limits) if tokens <= t and patches <= p)
        group = next(fitting, None)
        if group is None or targets > max_targets:
            raise MMJaxError(
                f"example {i} has {tokens} tokens, {patches} patches and {targets} targets; the "
                f"largest bucket holds {limits[-1]} and max_targets is {max_targets}: add a "
                "larger bucket or lower the resolution"
            )
        groups[group].append(i)
    for (tokens, patches), members in zip(limits, groups, strict=True):
        shape = BatchShape(batch_size, tokens, patches, max_targets)
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            index = np.full(batch_size, -1, np.int32)
            index[: len(chosen)] = chosen
            builder = BatchBuilder(shape, samples_per_row=1)
            for row in range(batch_size):
                builder.add(examples[chosen[row] if row < len(chosen) else chosen[0]], row)
            yield index, builder.batch()


def choose_buckets(
    examples: Sequence[Example], count: int = 4, multiple: int = 32
) -> list[tuple[int, int]]:
    """Choose at most ``count`` (tokens, patches) buckets by quantiles of the examples' lengths."""
    sizes = np.array([example_sizes(e)[:2] for e in examples]).reshape(-1, 2)
    if not len(sizes):
        raise MMJaxError("there is no example to choose buckets for")
    sizes = sizes[np.argsort(sizes[:, 0], kind="stable")]
    buckets: list[tuple[int, int]] = []
    for part in range(1, count + 1):
        upto = sizes[: max(1, -(-len(sizes) * part // count))]
        tokens, patches = (-(-int(n) // multiple) * multiple for n in upto.max(0))
        if (tokens, patches) not in buckets:
            buckets.append((tokens, patches))
    return buckets
