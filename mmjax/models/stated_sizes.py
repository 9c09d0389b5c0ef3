"""Sizes that a config.json, or ``model.config`` of a run, states: those that a model can have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.types import MMJaxError, is_number

_COUNTS = (
    *("hidden_size", "d_model", "intermediate_size", "ffn_dim", "vocab_size", "head_dim"),
    *("num_hidden_layers", "n_layers", "num_layers", "num_latents", "cross_attn_every_n_layers"),
    *("num_attention_heads", "n_heads", "num_heads", "num_key_value_heads"),
    *("max_position_embeddings", "max_seq_len", "mm_hidden_size", "tokenizer_model_max_length"),
    *("image_size", "patch_size", "num_channels", "pt_hw_seq_len"),
    *("ff_mult", "max_media", "max_num_frames", "original_max_position_embeddings"),
)
_FACTORS = (
    *("rope_theta", "rotary_emb_base", "scale_emb", "scale_depth", "dim_model_base"),
    *("factor", "low_freq_factor", "high_freq_factor"),
    *("expansion_ratio", "mlp_ratio", "alibi_bias_max"),
)
_NUMBERS = (
    *("initializer_range", "init_std", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
    *("partial_rotary_factor", "rotary_pct", "rope_pct", "clip_qkv", "attn_clip_qkv"),
)
_SHARES = ("hidden_dropout", "resid_pdrop", "embd_pdrop", "emb_pdrop", "dropout")
_FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_qkv_bias", "enable_bias"),
    *("lm_head_bias", "qk_layernorm", "qk_ln", "attn_qk_ln", "use_parallel_residual"),
    *("only_attend_immediate_media", "use_s2", "unfreeze_vision_tower"),
)
_TEXTS = ("mm_vision_tower", "mm_projector_type", "image_aspect_ratio")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # early LLaMAs say -1 for no padding
_MARKS = ("image_token_id", "media_token_id", "eoc_token_id", "answer_token_id")
_INNER = ("attn_config", "rope_parameters", "rope_scaling")
_OBJECTS = ("text_config", "vision_config", "perceiver_config", "cross_config", *_INNER)


def check_sizes(hf: Mapping[str, Any], where: str) -> None:
    """Raise MMJaxError for a size that is no whole number from 1 up, or a number below 0.

    And for what holds values of its own, as ``rope_parameters``, and is no object; for flags that
    are neither true nor false (any text would count as true), shares and token ids of another kind.

    where: who states them. What is None is not stated. Key heads divide the heads of queries. A
    rotation's base and what multiplies streams are above 0: others make numbers of no model.
    """
    for key in _OBJECTS:
        if hf.get(key) and not isinstance(hf[key], Mapping):
            raise MMJaxError(f"{where} says {key} {hf[key]!r}; give an object of its values")
    for key in _INNER:
        if hf.get(key):
            check_sizes(hf[key], where)
    for key in _COUNTS:
        check_count(key, hf.get(key), where)
    for keys, fits, wanted in _KINDS:
        for key in keys:
            value = hf.get(key)
            if value is not None and not fits(value):
                raise MMJaxError(f"{where} says {key} {_shown(value)}; give {wanted}")
    heads, keys = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if heads and keys and heads % keys:
        raise MMJaxError(
            f"{where} says num_key_value_heads {keys} beside num_attention_heads {heads}, which "
            "they do not divide; correct one of them"
        )


def check_count(key: str, value: Any, where: str) -> None:
    """Raise MMJaxError unless a value is None or a whole number from 1 up."""
    if value is not None and not (_is_whole(value) and value >= 1):
        raise MMJaxError(f"{where} says {key} {_shown(value)}; give a whole number from 1 up")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value)


def _is_token(value: Any) -> bool:
    return all(map(_is_whole, value)) if isinstance(value, list) else _is_whole(value)


def _shown(value: Any) -> str:
    huge = isinstance(value, int) and not isinstance(value, bool) and not is_number(value)
    return "a number that no float holds" if huge else repr(value)


_KINDS = (
    (_NUMBERS, lambda x: is_number(x) and x >= 0, "a number from 0 up"),
    (_FACTORS, lambda x: is_number(x) and x > 0, "a number above 0"),
    (_SHARES, lambda x: is_number(x) and 0 <= x < 1, "a share from 0 up and below 1"),
    (_FLAGS, lambda x: isinstance(x, int) and x in (0, 1), "true or false"),
    (_TEXTS, lambda x: isinstance(x, str), "a text"),
    (_TOKENS, _is_token, "a token's number, or a list of such"),
    (_MARKS, lambda x: _is_whole(x) and x >= 0, "a token's number"),
)


def without_nulls(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json states, without the sizes that are null there."""
    sizes = (*_COUNTS, *_FACTORS, *_NUMBERS, *_FLAGS)
    return {key: value for key, value in hf.items() if value is not None or key not in sizes}


_INSIDE = ("text_config", "rope_parameters", "rope_scaling")  # may state a value once more
_OWN = ("model_type", "architectures")  # of an object inside, another thing


def with_values(hf: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the values of ``model.config`` in place of its own.

    Of an object, as ``vision_config``, those that are given take the place of its own; an empty one
    takes that of all. What the file states a second time inside, as a Fuyu's sizes or a rotation's
    base, and would be read there, is replaced there, too.
    """
    out = dict(hf)
    for key, value in given.items():
        some = isinstance(value, Mapping) and value and isinstance(hf.get(key), Mapping)
        out[key] = {**hf[key], **value} if some else value
    for name in _INSIDE:
        if isinstance(inner := out.get(name), Mapping):
            said = given.get(name) or {}
            more = {k: v for k, v in given.items() if k not in (*said, *_OWN) and _states(inner, k)}
            out[name] = with_values(inner, more) if more else inner
    return out


def _states(hf: Mapping[str, Any], key: str) -> bool:
    inside = (hf[name] for name in _INSIDE if isinstance(hf.get(name), Mapping))
    return key in hf or any(_states(one, key) for one in inside)


def head_width(width: int, heads: int) -> int:
    """Return the width of a head; raises MMJaxError where heads do not divide the model's."""
    if width % heads:
        raise MMJaxError(
            f"config.json says a width of {width} and {heads} attention heads, which do not divide "
            "it; correct one of them"
        )
    return width // heads
