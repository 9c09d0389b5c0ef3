"""What a decoder drops in training: as its config.json says, or as a run's settings do."""

from __future__ import annotations

import dataclasses

from mmjax.models.api import Config
from mmjax.train.settings import ModelSettings
from mmjax.types import MMJaxError

NAMES = ("residual_dropout", "embedding_dropout")


def with_dropout(config: Config, settings: ModelSettings) -> Config:
    """Return the config with the rates of the settings where those state any.

    Raises MMJaxError for a rate, of either, that is no share below 1.
    """
    stated = {name: getattr(settings, name) for name in NAMES}
    stated = {name: rate for name, rate in stated.items() if rate is not None}
    decoder = dataclasses.replace(config.decoder, **stated)
    for name in NAMES:
        if not 0 <= (rate := getattr(decoder, name)) < 1:
            where = "" if name in stated else ", from its config.json"
            raise MMJaxError(
                f"model.{name} is {rate}{where}; give a share of at least 0 and below 1"
            )
    return dataclasses.replace(config, decoder=decoder) if stated else config


def dropout_line(config: Config) -> dict[str, str]:
    """Return a line that tells what is dropped, where anything is."""
    rates = {name.removesuffix("_dropout"): getattr(config.decoder, name) for name in NAMES}
    told = ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate)
    return {"dropout": told} if told else {}
