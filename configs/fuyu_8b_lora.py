"""Low-rank adapters for Fuyu-8B on one GPU with 48 GB or more.

COMMAND
    python train.py --config=configs/fuyu_8b_lora.py --workdir=runs/fuyu_8b_lora \\
        --config.model.init=/data/fuyu-8b --config.data.sources.train.path=/data/train.json
    python -m convert_weights.to_hf runs/fuyu_8b_lora/model /data/adapter --adapter

The 9.4 billion frozen weights stay in bfloat16 (18.8 GB), adapters and their moments in float32.
Not measured: this recipe has not been run on GPUs by the authors.
"""

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_fuyu
from mmjax.train.settings import RunSettings


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data."""
    quick = recipe_options(arg, quick=False).quick
    recipe = dict(
        name="fuyu_8b_lora",
        steps=3000,
        model=dict(init="set model.init to a Fuyu-8B folder", remat="names"),
        lora=dict(rank=64, alpha=32.0),
        data=dict(
            sources=dict(train=dict(kind="json", path="set data.sources.train.path")),
            seq_len=4096,
            max_patches=3840,
            max_targets=1024,
            batch_size=2,
            workers=4,
        ),
        optim=dict(lr=1e-4, schedule="cosine", warmup=0.03, weight_decay=0.0, b2=0.95),
        mesh=dict(fsdp=-1),
        checkpoint=dict(every=250, keep=2),
    )
    return fill(RunSettings, toy_fuyu(recipe) if quick else recipe)
