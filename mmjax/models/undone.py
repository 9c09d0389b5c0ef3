"""What a config.json asks of training and is not done here: said once; answers need none of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from mmjax.types import is_number

_DROPPED = {
    "attention_dropout": "attention's weights",
    "attn_pdrop": "attention's weights",
    "activation_dropout": "what the activation of an MLP returns",
    "layerdrop": "whole layers",
}
"""By their keys: what transformers, or the model's own code, drops in training."""


def tell_undone(hf: Mapping[str, Any], part: str = "") -> None:
    """Log a warning for each share of ``hf`` that training would have to drop and does not.

    part: of config.json that ``hf`` is, such as ``vision_config``.
    """
    where = part or f"config.json of a {hf.get('model_type')} model"
    for key, dropped in _DROPPED.items():
        if is_number(rate := hf.get(key)) and rate > 0:
            _say(where, key, rate, dropped)


@functools.cache
def _say(where: str, key: str, rate: float, dropped: str) -> None:
    logging.getLogger(__name__).warning(
        "%s says %s %g: training here drops nothing of %s (model.residual_dropout may take its "
        "place); answers and evaluations are the same",
        where, key, rate, dropped,
    )  # fmt: skip
