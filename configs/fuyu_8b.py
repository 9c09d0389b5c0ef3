"""Full fine-tuning of Fuyu-8B on instruction data, for GPUs with 80 GB or more, eight of them.

COMMAND
    python train.py --config=configs/fuyu_8b.py --workdir=runs/fuyu_8b \\
        --config.model.init=/data/fuyu-8b --config.data.sources.train.path=/data/train.json

float32 masters, cast to bfloat16 layer by layer; every layer's inputs are saved and the rest is
computed again. Not measured: this recipe has not been run on GPUs by the authors.
"""

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_fuyu
from mmjax.train.settings import RunSettings


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data."""
    quick = recipe_options(arg, quick=False).quick
    recipe = dict(
        name="fuyu_8b",
        steps=3000,
        accumulate=2,
        model=dict(init="set model.init to a Fuyu-8B folder", remat="full"),
        data=dict(
            sources=dict(train=dict(kind="json", path="set data.sources.train.path")),
            seq_len=4096,
            max_patches=3840,
            max_targets=1024,
            batch_size=16,
            workers=8,
        ),
        optim=dict(lr=1e-5, schedule="cosine", warmup=0.03, weight_decay=0.1, b2=0.95),
        mesh=dict(fsdp=-1),
        checkpoint=dict(every=250, keep=2),
    )
    return fill(RunSettings, toy_fuyu(recipe) if quick else recipe)
