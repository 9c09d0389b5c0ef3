"""FLOPs of a training step, from what the model multiplies and what of it is trained."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

from mmjax.models.api import Config
from mmjax.models.work import Work
from mmjax.train.settings import DataSettings
from mmjax.types import Batch


def train_flops(way: Sequence[Work], sizes: Mapping[str, int], trained: Collection[str]) -> float:
    """Return the FLOPs of a forward and a backward pass.

    way: what the forward pass multiplies; each stretch reads what those before it return. sizes: of
    all parameters by dotted name. trained: names of the trained ones.

    The gradient of a parameter costs its forward product once more, where it is trained; of a
    stretch trained in part, the trained share of its numbers. The gradient of the activations costs
    as much, and attention's scores, which are of two activations, twice: from the loss down to
    the first stretch with something trained, which counts whole, and no further. Adapters' own maps
    and recomputation by remat are not counted, as is usual in MFU.
    """
    total, below = 0.0, False
    for work in way:
        shares = {pattern: _share(pattern, sizes, trained) for pattern in work.maps}
        below = below or any(touched for touched, _ in shares.values())
        total += work.flops
        total += sum(flops * shares[pattern][1] for pattern, flops in work.maps.items())
        total += (work.flops + work.scores) * below
    return total


def _share(pattern: str, sizes: Mapping[str, int], trained: Collection[str]) -> tuple[bool, float]:
    """Return whether something of a pattern is trained, and the share of its numbers that is.

    Adapters lead gradients to where they stand; the kernels beside them are not trained.
    """
    names = fnmatch.filter(sizes, pattern)
    whole = [name for name in names if not name.endswith((".lora_a", ".lora_b"))]
    every = sum(sizes[name] for name in whole)
    chosen = sum(sizes[name] for name in whole if name in trained)
    return any(name in trained for name in names), chosen / every if every else 0.0


def step_flops(
    config: Config, data: DataSettings, sizes: Mapping[str, int], trained: Collection[str]
) -> Callable[[Batch], float]:
    """Return what tells the FLOPs of a step from the shapes of its batch, in full rows.

    sizes, trained: as for ``train_flops``. The batch holds ``data.batch_size`` rows, or a share.
    """

    @functools.cache
    def of_row(tokens: int, visual: int, width: int) -> float:
        asked = min(1.0, data.max_targets / tokens)
        way = config.work(tokens, asked=asked, visual=visual, width=width)
        return train_flops(way, sizes, trained)

    def flops(batch: Batch) -> float:
        visual, width = batch["patches"].shape[1:]
        return data.batch_size * of_row(batch["tokens"].shape[1], visual, width)

    return flops
