"""Rows no longer than a batch needs: a few lengths to choose from, each a program of its own."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mmjax.parallel.mesh import check_batch
from mmjax.train.settings import DataSettings
from mmjax.types import Batch, MMJaxError


def check_lengths(data: DataSettings, mesh: Mesh) -> None:
    """Raise MMJaxError for lengths that are no shorter than ``seq_len`` or do not divide."""
    for length in data.lengths:
        if not 1 <= length < data.seq_len:
            raise MMJaxError(
                f"data.lengths holds {length} and data.seq_len is {data.seq_len}; give lengths "
                "below it, or raise data.seq_len"
            )
        check_batch(mesh, data.batch_size, length, setting="data.lengths")


def fitted(batch: Batch, lengths: Sequence[int]) -> Batch:
    """Return a batch with its rows cut to the shortest of some lengths that holds their samples.

    batch: the rows of this process; all processes cut theirs alike. What they need is told on the
    devices, so that this then waits for the steps under way. So many tokens have no more targets,
    which stand in front: the head then runs on no more, too. Of patches, a batch without images
    keeps one row. Without lengths the batch comes back as it is.
    """
    if not lengths:
        return batch
    needed = np.array([_last(batch["segment_ids"] > 0), (batch["visual_index"] >= 0).any()])
    if jax.process_count() > 1:
        needed = multihost_utils.process_allgather(needed).max(0)
    whole = batch["tokens"].shape[1]
    length = next((n for n in sorted(lengths) if n >= needed[0]), whole)
    cut = {name: x if name == "patches" else x[:, :length] for name, x in batch.items()}
    return cut if needed[1] else {**cut, "patches": cut["patches"][:, :1]}


def _last(used: np.ndarray) -> int:
    """Return one more than the last used place of any row; used: bool[b, t]."""
    return int(np.max(np.flatnonzero(used.any(0)), initial=-1)) + 1
