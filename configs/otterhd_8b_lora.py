"""OtterHD with low-rank adapters on attention, MLP and head, for one GPU with 80 GB or more.

COMMAND
    python train.py --config=configs/otterhd_8b_lora.py --workdir=runs/otterhd_8b_lora \\
        --config.model.init=/data/fuyu-8b --config.data.sources.train.path=/data/otterhd.yaml
    python -m convert_weights.to_hf runs/otterhd_8b_lora/model /data/adapter --adapter

``configs/otterhd_8b.py`` with Otter's adapters: rank 64, alpha 32, dropout 0.05, on all the maps it
names. In its own code those of the MLP do nothing, because its fused kernel reads the base weight
alone; here every one is trained. The learning rate is ours, ten times that of full tuning. Weight
decay is off: a decayed adapter shrinks towards the base model. Four microbatches of two rows make
the batch of about 64 samples. Not measured: the authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs.otterhd_8b import settings
from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_fuyu
from mmjax.train.settings import RunSettings


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data."""
    quick = recipe_options(arg, quick=False).quick
    recipe = settings("otterhd_8b_lora", (448, 512, 768, 1024), seq_len=6144, max_patches=5632)
    recipe |= dict(
        accumulate=4,
        lora=dict(rank=64, alpha=32.0, dropout=0.05, targets=("attn.*", "mlp.*", "head")),
        optim=recipe["optim"] | dict(lr=1e-4, weight_decay=0.0),
    )
    return fill(RunSettings, toy_fuyu(recipe) if quick else recipe)
