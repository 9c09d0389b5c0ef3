"""Clever Flamingo: adapters on MPT-7B and on the gated blocks, and the whole resampler.

COMMAND
    python train.py --config=configs/clever_flamingo_9b.py --workdir=runs/clever \\
        --config.model.init=/data/of9b --config.data.sources.train.path=/data/instructions.json

As published (instruct_flamingo's tuning_config/lora[lm+xqttn]+perceiver): rank 128 with alpha 64,
so that updates are halved, on every map of the language model and of the gated blocks. All else is
configs/clever_flamingo_lora.py. Not measured: the authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs.clever_flamingo_lora import LANGUAGE, settings
from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_flamingo
from mmjax.train.settings import RunSettings


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data."""
    quick = recipe_options(arg, quick=False).quick
    targets = (*LANGUAGE, "cross.*")
    recipe = settings("clever_flamingo_9b", dict(rank=128, alpha=64.0, targets=targets))
    return fill(RunSettings, toy_flamingo(recipe) if quick else recipe)
