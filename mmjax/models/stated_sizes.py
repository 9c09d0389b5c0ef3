"""Sizes that a config.json, or ``model.config`` of a run, states: those that a model can have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmjax.types import MMJaxError

_COUNTS = (
    *("hidden_size", "d_model", "intermediate_size", "ffn_dim", "vocab_size", "head_dim"),
    *("num_hidden_layers", "n_layers", "num_layers", "num_latents", "cross_attn_every_n_layers"),
    *("num_attention_heads", "n_heads", "num_heads", "num_key_value_heads"),
    *("max_position_embeddings", "max_seq_len", "mm_hidden_size"),
    *("image_size", "patch_size", "num_channels"),
)
_FACTORS = ("rope_theta", "rotary_emb_base", "scale_emb", "scale_depth", "dim_model_base")
_NUMBERS = (
    *("initializer_range", "init_std", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
    *("hidden_dropout", "partial_rotary_factor"),
)
_OBJECTS = (
    *("text_config", "vision_config", "perceiver_config", "cross_config", "attn_config"),
    *("rope_parameters", "rope_scaling"),
)


def check_sizes(hf: Mapping[str, Any], where: str) -> None:
    """Raise MMJaxError for a size that is no whole number from 1 up, or a number below 0.

    And for what holds values of its own, as ``rope_parameters``, and is no object.

    where: who states them. What is None is not stated. Key heads divide the heads of queries. A
    rotation's base and what multiplies streams are above 0: others make numbers of no model.
    """
    for key in _OBJECTS:
        if hf.get(key) and not isinstance(hf[key], Mapping):
            raise MMJaxError(f"{where} says {key} {hf[key]!r}; give an object of its values")
    for key in _COUNTS:
        check_count(key, hf.get(key), where)
    for key in _NUMBERS:
        value = hf.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < math.inf):
            raise MMJaxError(f"{where} says {key} {value!r}; give a number from 0 up")
    for key in _FACTORS:
        value = hf.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise MMJaxError(f"{where} says {key} {value!r}; give a number above 0")
    heads, keys = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if heads and keys and heads % keys:
        raise MMJaxError(
            f"{where} says num_key_value_heads {keys} beside num_attention_heads {heads}, which "
            "they do not divide; correct one of them"
        )


def check_count(key: str, value: Any, where: str) -> None:
    """Raise MMJaxError unless a value is None or a whole number from 1 up."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and value >= 1):
        raise MMJaxError(f"{where} says {key} {value!r}; give a whole number from 1 up")


def without_nulls(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json states, without the sizes that are null there."""
    sizes = (*_COUNTS, *_FACTORS, *_NUMBERS)
    return {key: value for key, value in hf.items() if value is not None or key not in sizes}


def head_width(width: int, heads: int) -> int:
    """Return the width of a head; raises MMJaxError where heads do not divide the model's."""
    if width % heads:
        raise MMJaxError(
            f"config.json says a width of {width} and {heads} attention heads, which do not divide "
            "it; correct one of them"
        )
    return width // heads
