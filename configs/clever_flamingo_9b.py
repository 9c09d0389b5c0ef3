"""Clever Flamingo: adapters on MPT-7B and on the gated blocks, and the whole resampler.

COMMAND
    python train.py --config=configs/clever_flamingo_9b.py --workdir=runs/clever \\
        --config.model.init=/data/of9b --config.data.sources.train.path=/data/instructions.json

As published (instruct_flamingo's tuning_config/lora[lm+xqttn]+perceiver): rank 128 with alpha 64,
so that updates are halved, on every map of the language model and of the gated blocks. All else is
configs/clever_flamingo_lora.py, which also says how to take a tuning config. Not measured: the
authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs.clever_flamingo_lora import LANGUAGE, get_recipe


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; it takes what configs/clever_flamingo_lora.py takes."""
    targets = (*LANGUAGE, "cross.*")
    return get_recipe(arg, "clever_flamingo_9b", dict(rank=128, alpha=64.0, targets=targets))
