"""The magnifier: a small Fuyu learns to read handwritten digits hidden in photographs.

COMMAND
    make quickstart
    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

One digit of scikit-learn, 8x8 pixels, stands somewhere in a 96x96 crop of a real photograph, on
the patch grid: a model this small needs that. Test digits are never seen in training. Training
draws a resolution for each sample; evaluation shows the same pictures at four resolutions.
"""

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.recipes import MAGNIFIER_MODEL
from mmjax.train.settings import RunSettings


def task(name: str, split: str, limit: int | None, **more) -> dict:
    """Return one evaluation of the held-out digits, at full size and reduced."""
    source = dict(kind="magnifier", split=split)
    sides = (None, 72, 48, 24)
    more |= dict(resolutions=sides, max_new_tokens=4, limit=limit)
    return dict(name=name, source=source, **more)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` shrinks it to seconds."""
    quick = recipe_options(arg, quick=False).quick
    limit = 16 if quick else None
    return fill(
        RunSettings,
        dict(
            name="quickstart",
            seed=0,
            steps=20 if quick else 1500,
            model=MAGNIFIER_MODEL,
            data=dict(
                sources=dict(magnifier=dict(kind="magnifier", split="train")),
                resolutions=(96, 96, 96, 96, 48),
                seq_len=192,
                max_patches=160,
                max_targets=16,
                batch_size=4 if quick else 24,
            ),
            optim=dict(lr=2e-3, warmup=0.05, schedule="cosine", b2=0.98, weight_decay=0.1),
            eval=dict(
                tasks=(
                    task("magnifier", "test", limit, scorer="exact_match", chance=0.1),
                    task("magnifier_choice", "test_mc", limit, scorer="multiple_choice"),
                ),
                every=0 if quick else 300,
                limit=100,
                batch_size=32,
            ),
            checkpoint=dict(every=10 if quick else 300),
            log=dict(every=10),
        ),
    )
