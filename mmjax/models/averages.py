"""Weighted averages of trained models: several recipes of one architecture become one model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from mmjax.models import pretrained
from mmjax.models.pretrained import Pretrained
from mmjax.models.views import Averaged, Canonical
from mmjax.types import MMJaxError
from mmjax.weights import rules as R

TOLERANCE = 1e-6
"""How far from 1 the weights may sum: what is left of 0.1 + 0.2 + 0.7 in binary is far less."""


def check_weights(weights: Sequence[float]) -> None:
    """Raise MMJaxError unless there are two or more weights above 0 whose sum is 1."""
    if len(weights) < 2:
        raise MMJaxError(f"an average is of two models or more, and {len(weights)} is given")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise MMJaxError(
                f"the weight {weight:g} is not above 0; leave its model away, or give it a share"
            )
    total = math.fsum(weights)
    if abs(total - 1) > TOLERANCE:
        shares = ", ".join(f"{weight / total:.6g}" for weight in weights)
        raise MMJaxError(
            f"the weights {', '.join(f'{w:g}' for w in weights)} sum to {total:.6g}, not to 1; in "
            f"the same proportion these do: {shares}"
        )


def averaged(models: Sequence[tuple[Pretrained, float]]) -> Pretrained:
    """Return the weighted average of models, computed piece by piece as it is read.

    The adapters of each are merged into it first. Sums are float32; a parameter is then in the
    widest dtype that it has in any of them. Config and companion files are the first model's.
    Raises MMJaxError for weights that ``check_weights`` refuses, and for models of which family or
    config differ, naming the first value that does. Call inside a mesh.
    """
    weights = [weight for _, weight in models]
    check_weights(weights)
    first = models[0][0]
    for other, _ in models[1:]:
        _check_alike(first, other)
    readers = [_whole(opened) for opened, _ in models]
    reader = Averaged(readers, weights)
    return dataclasses.replace(
        first,
        reader=reader,
        rules=tuple(R.Rule(key, key) for key in reader.keys()),  # noqa: SIM118
        ignore=(),
        lora=None,
    )


def _whole(opened: Pretrained) -> Any:
    """Return a reader of a model's parameters by our names, without adapters."""
    if opened.lora is not None:
        return pretrained.merged(opened).reader
    abstract = pretrained.abstract_params(opened.family, opened.config)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    R.check(opened.rules, shapes, opened.reader, opened.ignore)
    return Canonical(opened.reader, opened.rules, shapes)


def _check_alike(first: Pretrained, other: Pretrained) -> None:
    if first.family.name != other.family.name:
        found = ("family", first.family.name, other.family.name)
    else:
        found = next(_differing(first.config, other.config), None)
    if found is not None:
        name, ours, theirs = found
        raise MMJaxError(
            f"{first.path} and {other.path} are not of one architecture: {name} is {ours!r} and "
            f"{theirs!r}; average models that were trained from the same one"
        )


def _differing(ours: Any, theirs: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of what differs between two configs of one family.

    What a config's dataclass leaves out of comparisons, such as a path, may differ.
    """
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if not field.compare or a == b:
            continue
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            yield from _differing(a, b, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, a, b
