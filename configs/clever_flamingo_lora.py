"""Clever Flamingo, first stage: adapters on MPT-7B and the whole resampler.

COMMAND
    python -m convert_weights.to_jax checkpoint.pt /data/of9b --lm /data/mpt-7b \\
        --vision /data/ViT-L-14-336px.pt --vision-config ViT-L-14-336
    python train.py --config=configs/clever_flamingo_lora.py --workdir=runs/clever_lora \\
        --config.model.init=/data/of9b --config.data.sources.train.path=/data/instructions.json

With a tuning config of instruct_flamingo's own, which then says what is adapted and trained:
    python train.py --config=configs/clever_flamingo_lora.py:tuning=perceiver.json ...

The data are a list of samples, or a dataset config that shares out data.sources.train.num_samples
draws of an epoch (-1: every record once) by ratio or data.sources.train.sampling=sqrt; see
docs/data_formats.md.

As published (Chen et al. 2023, instruct_flamingo's tuning_config/lora+perceiver): rank 64, alpha 64
on the four maps of each MPT block, 1e-4 constant after 1,000 steps, a batch of 64, prompts without
a system line, up to 32 more turns drawn into a sample. Weight decay of 0.1 is for the gated blocks
alone, which are frozen here. The peer takes the mean loss of each card's microbatch and clips their
growing sum after every one of the four; here a step has one mean over its targets, clipped once.
Not measured: the authors have not run this on GPUs.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.openflamingo_9b import MPT_7B
from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_flamingo
from mmjax.train.settings import RunSettings

LANGUAGE = ("attn.*", "mlp.*")


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data.

    ``:tuning=FILE`` takes adapters and what is trained from a tuning config.
    """
    return get_recipe(arg, "clever_flamingo_lora", dict(rank=64, alpha=64.0, targets=LANGUAGE))


def get_recipe(arg: str | None, name: str, lora: dict[str, Any]) -> ConfigDict:
    """Return a Clever Flamingo recipe by its argument; lora: its adapters if that names none."""
    given = recipe_options(arg, quick=False, tuning="")
    recipe = settings(name, lora)
    if given.tuning:
        recipe |= dict(train=(), lora=dict(tuning_config=given.tuning))
    return fill(RunSettings, toy_flamingo(recipe) if given.quick else recipe)


def settings(name: str, lora: dict[str, Any]) -> dict[str, Any]:
    """Return what the Clever Flamingo recipes share, with other adapters."""
    return dict(
        name=name,
        steps=150_000,
        accumulate=4,
        model=dict(
            family="flamingo",
            init="set model.init to a folder of convert_weights.to_jax",
            plan_config=dict(text_config=MPT_7B, vision_config=dict(image_size=336)),
            remat="names",
        ),
        train=("perceiver.*",),
        lora=lora,
        data=dict(
            sources=dict(
                train=dict(
                    kind="instruct_flamingo",
                    path="set data.sources.train.path",
                    num_samples=-1,
                    sampling="ratio",
                    img_dir=None,
                )
            ),
            template="guanaco_no_prompt_chat",
            multiturn=dict(turns=32, max_images=16, max_tokens=2048),
            augment=("square_pad",),
            max_images=16,
            too_long="truncate",
            seq_len=2048,
            max_patches=16,
            max_targets=2048,
            batch_size=64,
            workers=8,
        ),
        optim=dict(lr=1e-4, schedule="constant", warmup=1000, weight_decay=0.1, decay=("cross.*",)),
        mesh=dict(fsdp=-1),
        checkpoint=dict(every=1000, keep=2),
    )
