"""OtterHD as it was meant: all of Fuyu-8B tuned on mixed instructions at dynamic resolution.

COMMAND
    python train.py --config=configs/otterhd_8b.py --workdir=runs/otterhd_8b \\
        --config.model.init=/data/fuyu-8b --config.data.sources.train.path=/data/otterhd.yaml

For eight GPUs with 80 GB. The YAML is Otter's training YAML (docs/data_formats.md). As in the
paper (Li et al. 2023): AdamW, learning rate 1e-5 rising over 1 % of the steps and falling in a
line, weight decay 0.1, batch 64, three epochs. Where Otter's code differs from the paper, this is
the paper: the longest side is drawn for each sample from 448, 512, 768 and 1024 with the aspect
kept (its code squashes, up to 768), decay acts on every kernel (its code decays nothing of Fuyu),
every answer is learnt and every record is seen. ``--config.data.legacy_otter=True
--config.data.resolutions='(448,512,768)'`` goes back to its pictures, labels and text.

A square of these sizes makes 240, 342, 702 or 1,260 tokens; with 100 of text a sample has 736 on
average, so eight rows of 6,144 tokens hold about 64 samples, and more where pictures are smaller or
not square: images are never enlarged. steps = epochs * records / 64: 17,344 are three epochs of the
paper's 370,000; set steps for other data. Not measured: the authors have not run this on GPUs.
"""

from typing import Any

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_fuyu
from mmjax.train.settings import RunSettings


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data."""
    quick = recipe_options(arg, quick=False).quick
    recipe = settings("otterhd_8b", (448, 512, 768, 1024), seq_len=6144, max_patches=5632)
    return fill(RunSettings, toy_fuyu(recipe) if quick else recipe)


def settings(
    name: str, resolutions: tuple[int, ...], *, seq_len: int, max_patches: int
) -> dict[str, Any]:
    """Return what the OtterHD recipes share, at other resolutions and row lengths."""
    return dict(
        name=name,
        steps=17_344,
        model=dict(init="set model.init to a Fuyu-8B folder", remat="names"),
        data=dict(
            sources=dict(train=dict(kind="mimicit_yaml", path="set data.sources.train.path")),
            resolutions=resolutions,
            seq_len=seq_len,
            max_patches=max_patches,
            max_targets=1024,
            batch_size=8,
            workers=8,
        ),
        optim=dict(lr=1e-5, schedule="linear", warmup=0.01, weight_decay=0.1, b2=0.999),
        mesh=dict(fsdp=-1),
        checkpoint=dict(every=500, keep=2),
    )
