"""What mmjax knows of an architecture: how its config.json reads, what its tensors are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.types import MMJaxError
from mmjax.weights.rules import Rule


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture, by the ``model_type`` of its config.json.

    layers: the path of its list of layers. read, write: from config.json's values to a decoder, and
    back. rules: the table, under ``decoder`` here. marks: the beginnings of keys by which its
    tensors are told from others'. ignore: regular expressions of keys without anything to learn.
    """

    model_type: str
    class_name: str
    layers: str
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    rules: Sequence[Rule]
    marks: tuple[str, ...]
    ignore: tuple[str, ...] = ()


def refuse(hf: Mapping[str, Any], **supported: Any) -> None:
    """Raise MMJaxError where config.json states something else than the values supported.

    supported: key -> value, or a tuple of values; a key that is not stated is fine.
    """
    for key, good in supported.items():
        good = good if isinstance(good, tuple) else (good,)
        if key in hf and hf[key] not in good:
            raise MMJaxError(
                f"config.json of a {hf.get('model_type')} model says {key} {hf[key]!r}; supported "
                f"is {' or '.join(map(repr, good))}"
            )


def rope_of(hf: Mapping[str, Any], theta: float, fraction: float = 1.0) -> dict[str, float]:
    """Return ``rope_theta`` and ``rope_fraction`` from any of the places transformers keeps them.

    theta, fraction: where nothing is stated. Raises MMJaxError for a scaled rotation.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise MMJaxError(f"config.json says rope_type {kind!r}; supported is 'default'")

    def pick(*keys: str, default: float) -> float:
        stated = (place.get(key) for place in (rope, hf) for key in keys)
        return float(next((value for value in stated if value is not None), default))

    return {
        "rope_theta": pick("rope_theta", "rotary_emb_base", default=theta),
        "rope_fraction": pick("partial_rotary_factor", "rotary_pct", default=fraction),
    }


def rope_json(c: DecoderConfig) -> dict[str, Any]:
    """Return the rotation's values for config.json, where old and new transformers look."""
    both = {"rope_theta": c.rope_theta, "partial_rotary_factor": c.rope_fraction}
    return {
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", **both},
    }
