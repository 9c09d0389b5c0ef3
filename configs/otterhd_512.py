"""OtterHD at one fixed resolution, 512 pixels: what dynamic resolution is compared with.

COMMAND
    python train.py --config=configs/otterhd_512.py --workdir=runs/otterhd_512 \\
        --config.model.init=/data/fuyu-8b --config.data.sources.train.path=/data/otterhd.yaml

``configs/otterhd_8b.py`` with every picture reduced to a longest side of 512, aspect kept. A
square makes 342 tokens, so rows of 3,584 hold about 64 samples in a step. Not measured: the
authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs.otterhd_8b import settings
from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_fuyu
from mmjax.train.settings import RunSettings


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data."""
    quick = recipe_options(arg, quick=False).quick
    recipe = settings("otterhd_512", (512,), seq_len=3584, max_patches=3072)
    return fill(RunSettings, toy_fuyu(recipe) if quick else recipe)
