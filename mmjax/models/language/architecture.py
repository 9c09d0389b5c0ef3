"""What mmjax knows of an architecture: how its config.json reads, what its tensors are called."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.stated_sizes import check_sizes, without_nulls
from mmjax.models.undone import tell_undone
from mmjax.nn import rope
from mmjax.types import MMJaxError
from mmjax.weights.rules import Rule


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture, by the ``model_type`` of its config.json.

    layers: the path of its list of layers. read, write: from config.json's values to a decoder, and
    back; others call ``decoder``. rules: the table, under ``decoder`` here. marks: the beginnings
    of keys by which its tensors are told from others'. ignore: regular expressions of keys without
    anything to learn. fused: the table of older files in which q, k and v are one map. aliases:
    further model_types that mean the same.
    """

    model_type: str
    class_name: str
    layers: str
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    rules: Sequence[Rule]
    marks: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    fused: Sequence[Rule] = ()
    aliases: tuple[str, ...] = ()

    def decoder(self, hf: Mapping[str, Any]) -> DecoderConfig:
        """Return the decoder of a config.json; what training leaves out of it is said once.

        Raises MMJaxError for what is not supported, and for a size that is not stated.
        """
        check_sizes(hf, f"config.json of a {self.model_type} model")
        try:
            found = self.read(without_nulls(hf))
        except KeyError as error:
            raise MMJaxError(
                f"config.json of a {self.model_type} model does not say {error.args[0]}; give the "
                "one that was published with the weights, or state it"
            ) from error
        check_rotation(found, self.model_type)
        # transformers 5 writes a model_type of "" among the values of attention.
        tell_undone({**hf, **(hf.get("attn_config") or {}), "model_type": self.model_type})
        return found


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


def stated_token(token: int | list[int] | None) -> int | None:
    """Return a token id of config.json; of several ends the first, which is the model's own."""
    return next(iter(token), None) if isinstance(token, list) else token


_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def rope_of(hf: Mapping[str, Any], theta: float, fraction: float | None) -> dict[str, Any]:
    """Return the decoder's ``rope_...`` values from any of the places transformers keeps them.

    GPT-NeoX's own words, ``rotary_...``, count before the others. theta, fraction: where nothing is
    stated; a fraction of None is that of an architecture that rotates whole heads, where
    transformers reads none or fails. Where both are, ``rope_scaling`` counts and nothing of
    ``rope_parameters`` does, as in transformers. Raises MMJaxError for a rotation that is scaled in
    another way than Llama 3.1's, for a part of a head where none may be stated, and for what is no
    number.
    """
    where = f"config.json of a {hf.get('model_type')} model"
    new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    stated = old or new
    kind = rope_kind(stated)
    if kind not in ("default", "llama3"):
        raise MMJaxError(
            f"{where} says rope_type {kind!r}; supported is 'default' or 'llama3'. Give a model of "
            "the shorter context, if there is one"
        )
    if kind == "llama3":
        missing = [key for key in _LLAMA3.values() if stated.get(key) is None]
        if missing:
            raise MMJaxError(f"config.json says rope_type 'llama3' without {', '.join(missing)}")

    def pick(*keys: str, default: float) -> float:
        values = ((key, place.get(key)) for place in (stated, hf) for key in keys)
        key, value = next(((k, v) for k, v in values if v is not None), ("", default))
        if not isinstance(value, int | float):
            raise MMJaxError(f"{where} says {key} {value!r}; give a number")
        return float(value)

    part = pick("rotary_pct", "partial_rotary_factor", "rope_pct", default=fraction or 1.0)
    if fraction is None and part != 1.0:
        raise MMJaxError(
            f"{where} says partial_rotary_factor {part:g}; supported is 1.0, for its heads are "
            "rotated whole. Remove it if the weights were trained so, as transformers runs them"
        )
    scaled = {ours: stated[theirs] for ours, theirs in _LLAMA3.items()} if kind == "llama3" else {}
    return {
        "rope_theta": pick("rotary_emb_base", "rope_theta", default=theta),
        "rope_fraction": part,
        "rope_scaling": rope.Llama3Scaling(**scaled) if scaled else None,
    }


def check_rotation(c: DecoderConfig, model_type: str) -> None:
    """Raise MMJaxError for a base that turns nothing, or a rotated part that makes no pairs.

    Of an odd one transformers' GPT-NeoX and Phi-3 rotate one dimension more; its others fail. And
    for a part that is more than the whole head.
    """
    if c.position == "rope" and not 0 < c.rope_theta < math.inf:
        raise MMJaxError(
            f"config.json of a {model_type} model says rope_theta {c.rope_theta:g}; give a number "
            "above 0"
        )
    rotated = int(c.head_dim * c.rope_fraction)
    if c.position == "rope" and rotated > c.head_dim:
        raise MMJaxError(
            f"config.json of a {model_type} model says partial_rotary_factor {c.rope_fraction:g}; "
            "it is a share of a head's dimensions, at most 1"
        )
    if c.position == "rope" and (rotated < 2 or rotated % 2):
        raise MMJaxError(
            f"config.json of a {model_type} model says to rotate {rotated} of a head's "
            f"{c.head_dim} dimensions (partial_rotary_factor {c.rope_fraction:g}), which makes no "
            "pairs; state the sizes that the weights were trained with"
        )


def rope_kind(stated: Mapping[str, Any]) -> str:
    """Return how a rotation is scaled, by its new name or its old one; ``default`` is not."""
    return stated.get("rope_type") or stated.get("type") or "default"


def rope_json(c: DecoderConfig) -> dict[str, Any]:
    """Return the rotation's values for config.json, where old and new transformers look."""
    both = {"rope_theta": c.rope_theta, "partial_rotary_factor": c.rope_fraction}
    if c.rope_scaling is None:
        parameters = {"rope_type": "default", **both}
        return {**both, "rope_parameters": parameters}
    scaled = {theirs: getattr(c.rope_scaling, ours) for ours, theirs in _LLAMA3.items()}
    parameters = {"rope_type": "llama3", **scaled, **both}
    return {**both, "rope_parameters": parameters, "rope_scaling": parameters}
