"""Our side of the bunny suite."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bench import bunny, ours
from bench.cases import Case

write_model = bunny.write_model


def make(case: Case, folder: str, impl: str) -> ours.Train | ours.Decode:
    """Return the subject of a case."""
    return (Train if case.options["kind"] == "train" else Decode)(case, folder, impl)


class Train(ours.Train):
    """What Bunny's second stage trains: the language model or adapters on it, and the projector."""

    def __init__(self, case: Case, folder: str, impl: str):
        self.chosen = case.options["trained"]
        super().__init__(case, folder if self.chosen == "all" else _adapter(folder), impl)
        trained, frozen = (
            sum(x.size for x in self.jax.tree.leaves(tree))
            for tree in (self.state.params, self.frozen)
        )
        self.details = {
            "parameters": trained + frozen,
            "trained": trained,
            "temp_size_in_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
        }

    def optimizer(self) -> dict[str, Any]:
        """Return the learning rates of Bunny's scripts; nothing decays."""
        from mmjax.train.optim import RateSettings

        rates = bunny.TRAINED[self.chosen]
        own = (RateSettings("projector.*", rates["projector_lr"]),)
        return {
            "lr": rates["lr"],
            "rates": own if rates["projector_lr"] != rates["lr"] else (),
            "weight_decay": 0.0,
        }

    def trained(self, names: list[str]) -> set[str]:
        """Return the parameters that are trained."""
        from mmjax.train.state import trainable_names

        if self.chosen == "all":
            return trainable_names(names, (), False, ("decoder.*", "projector.*"))
        return trainable_names(names, (), True, ("projector.*",))

    def make_batch(self, case: Case) -> dict[str, np.ndarray]:
        """Make the batch of every step."""
        return bunny.train_batch(case)


def _adapter(folder: str) -> str:
    return os.path.join(folder, "lora")


class Decode(ours.Decode):
    """``LoadedModel.generate_tokens``, greedily, prompts of token ids with grey levels."""

    def make_examples(self, case: Case) -> list[dict[str, np.ndarray]]:
        """Make the encoded prompts."""
        return bunny.prompts(case)
