"""Text alone: Fuyu-8B tuned on conversations without pictures, for eight GPUs with 80 GB.

COMMAND
    python train.py --config=configs/fuyu_text_only.py --workdir=runs/fuyu_text_only \\
        --config.model.init=/data/fuyu-8b --config.data.sources.train.path=/data/train.jsonl

Records are those of docs/data_formats.md without images; no black picture is put in their place. A
step takes eight rows of 8,192 tokens. The patch projection is frozen: without pictures it has no
gradient, and weight decay alone would wear it down. Not measured: the authors have not run this on
GPUs.
"""

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_fuyu
from mmjax.train.settings import RunSettings

SUMS = "User: Assistant: What is plus? " + " ".join(map(str, range(39)))


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated sums."""
    quick = recipe_options(arg, quick=False).quick
    recipe = dict(
        name="fuyu_text_only",
        steps=3000,
        freeze=("patch_embed.*",),
        model=dict(init="set model.init to a Fuyu-8B folder", remat="names"),
        data=dict(
            sources=dict(train=dict(kind="json", path="set data.sources.train.path")),
            seq_len=8192,
            max_patches=8,  # a static shape has to hold some; they stay empty
            max_targets=4096,
            batch_size=8,
            workers=8,
        ),
        # In one piece: every chunk gathers the head's kernel and sums its gradient again.
        loss_chunk=4096,
        optim=dict(lr=1e-5, schedule="linear", warmup=0.01, weight_decay=0.1, b2=0.999),
        mesh=dict(fsdp=-1),
        checkpoint=dict(every=500, keep=2),
    )
    if quick:
        recipe = toy_fuyu(recipe)
        recipe["model"] |= dict(words=(SUMS,))
        recipe["data"] |= dict(sources=dict(train=dict(kind="sums", split="train")), max_patches=8)
        task = dict(name="sums", source=dict(kind="sums", split="test"), limit=8, max_new_tokens=2)
        recipe["eval"] = dict(tasks=(task,))
    return fill(RunSettings, recipe)
