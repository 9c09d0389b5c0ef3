"""Our side of the flamingo suite."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench import flamingo, ours
from bench.cases import Case, FlamingoSize

TABLE = "decoder.embed.embedding"


def write_model(size: FlamingoSize, folder: str) -> None:
    """Write a random model for a run without a peer; its rows have no parity and do not count."""
    import jax
    from flax import nnx

    from mmjax.models import converted, registry
    from mmjax.nn import paths
    from mmjax.parallel.mesh import use

    family = registry.family("flamingo")
    config = family.Config.from_hf(flamingo.config_json(size))
    with use():
        state = nnx.state(family.Model(config, rngs=nnx.Rngs(0)))
    params = {name: np.array(jax.device_get(x)) for name, x in paths.flatten(state).items()}
    params[TABLE][[size.eoc, size.media]] *= 0.25  # a greedy answer has neither
    for gate in ("cross.attn_gate", "cross.ff_gate"):
        params[gate] += 0.5
    converted.save_model(folder, params, family=family, config=config)


def make(case: Case, folder: str, impl: str) -> ours.Train | ours.Decode:
    """Return the subject of a case."""
    return (Train if case.options["kind"] == "train" else Decode)(case, folder, impl)


class Train(ours.Train):
    """What OpenFlamingo trains: resampler, gated blocks, the embeddings of its two tokens."""

    def __init__(self, case: Case, folder: str, impl: str):
        super().__init__(case, folder, impl)
        trained, frozen = (
            sum(x.size for x in self.jax.tree.leaves(tree))
            for tree in (self.state.params, self.frozen)
        )
        self.details = {
            "parameters": trained + frozen,
            "trained": trained - (case.size.vocab - 2) * case.size.d,
            "temp_size_in_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
        }

    def optimizer(self) -> dict[str, Any]:
        """Weight decay is that of the gated blocks, gates and norms too."""
        return {
            "lr": flamingo.LEARNING_RATE,
            "weight_decay": flamingo.WEIGHT_DECAY,
            "decay": ("cross.*",),
        }

    def trained(self, names: list[str]) -> set[str]:
        """Return the parameters that are trained, the table whole."""
        from mmjax.train.state import trainable_names

        return trainable_names(names, (), False, ("perceiver.*", "cross.*"), (TABLE,))

    def rows(self, case: Case) -> dict[str, Any]:
        """Return the two rows of the table that are trained."""
        from mmjax.train.rows import Rows

        return {TABLE: Rows(0, (case.size.eoc, case.size.media))}

    def make_batch(self, case: Case) -> dict[str, np.ndarray]:
        """Make the batch of every step."""
        return flamingo.train_batch(case)


class Decode(ours.Decode):
    """``LoadedModel.generate_tokens``, greedily, prompts of token ids with grey levels."""

    def make_examples(self, case: Case) -> list[dict[str, np.ndarray]]:
        """Make the encoded prompts."""
        return flamingo.prompts(case)
