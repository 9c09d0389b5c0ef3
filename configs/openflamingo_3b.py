"""OpenFlamingo-3B: MPT-1B sees through CLIP ViT-L/14, a gated block before every layer.

COMMAND
    python -m convert_weights.to_jax checkpoint.pt /data/of3b --lm /data/mpt-1b-redpajama-200b \\
        --vision /data/ViT-L-14.pt --vision-config ViT-L-14
    python train.py --config=configs/openflamingo_3b.py --workdir=runs/of3b \\
        --config.model.init=/data/of3b \\
        --config.data.sources.laion.path='/data/laion/{0000..0999}.tar' \\
        --config.data.sources.mmc4.path='/data/mmc4/{0000..0999}.tar'

From a language model and CLIP alone, as the published ones began, instead of a checkpoint:
    python train.py --config=configs/openflamingo_3b.py:parts --workdir=runs/of3b \\
        --config.model.parts.lm=/data/mpt-1b-redpajama-200b \\
        --config.model.parts.vision=/data/ViT-L-14.pt \\
        --config.data.sources.laion.path=... --config.data.sources.mmc4.path=...

From TFDS datasets in ArrayRecord files in place of shards (docs/data_formats.md):
    python train.py --config=configs/openflamingo_3b.py:tfds --workdir=runs/of3b \\
        --config.model.init=/data/of3b \\
        --config.data.sources.laion.name=/data/laion/1.0.0 \\
        --config.data.sources.mmc4.name=/data/mmc4/1.0.0

The published recipe (Awadalla et al. 2023, and the options of open_flamingo/train/train.py): AdamW
at 1e-4, constant after 1,875 steps of warm-up, weight decay 0.1 on the gated blocks alone, the loss
of LAION's captions weighs 0.2 beside MMC4's documents; trained are the resampler, the gated blocks
and the embeddings of <image> and <|endofchunk|>. There 60 million documents and 120 million
captions were seen; rows here are packed, so a step holds as many of them as fit, and steps say how
long. Its code cuts a document at 256 tokens and a caption at 32; here a row's 2,048 are the limit.
Not measured: the authors have not run this on GPUs.
"""

from typing import Any

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_flamingo
from mmjax.train.settings import RunSettings

MPT_1B = dict(model_type="mosaic_gpt", d_model=2048, n_layers=24, n_heads=16, vocab_size=50_280,
              attn_qk_ln=True)  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` is a toy on generated data, ``:parts`` starts from parts.

    ``:tfds`` reads TFDS datasets; several are joined by commas.
    """
    return get_recipe(arg, "openflamingo_3b", MPT_1B, every=1, batch_size=32)


def get_recipe(arg: str | None, name: str, language: dict, **sizes: int) -> ConfigDict:
    """Return an OpenFlamingo recipe by its argument; sizes: ``every`` and ``batch_size``."""
    given = recipe_options(arg, quick=False, parts=False, tfds=False)
    recipe = settings(name, language, parts=given.parts, tfds=given.tfds, **sizes)
    return fill(RunSettings, toy_flamingo(recipe) if given.quick else recipe)


def settings(
    name: str, language: dict, *, every: int, batch_size: int, parts: bool, tfds: bool
) -> dict[str, Any]:
    """Return what the OpenFlamingo recipes share.

    language: its config.json, to plan with. parts: start from a language model and CLIP alone.
    tfds: the data lie in TFDS datasets, not in shards.
    """
    sources = dict(
        laion=dict(kind="laion", path="set data.sources.laion.path"),
        mmc4=dict(kind="mmc4", path="set data.sources.mmc4.path"),
    )
    if tfds:
        sources = dict(
            laion=dict(
                kind="tfds_pairs",
                name="set data.sources.laion.name",
                split="train",
                fields=dict(image="image", caption="caption"),
            ),
            mmc4=dict(
                kind="tfds_interleaved",
                name="set data.sources.mmc4.name",
                split="train",
                fields=dict(
                    text_list="text_list",
                    image="image_info.image",
                    similarity_matrix="similarity_matrix",
                ),
            ),
        )
    start = dict(init="set model.init to a folder of convert_weights.to_jax")
    if parts:
        start = dict(
            parts=dict(lm="set model.parts.lm", vision="set model.parts.vision"),
            config=dict(cross_attn_every_n_layers=every),
        )
    return dict(
        name=name,
        steps=234_000,
        model=dict(
            family="flamingo",
            **start,
            plan_config=dict(text_config=language, cross_attn_every_n_layers=every),
            remat="names",
        ),
        train=("perceiver.*", "cross.*"),
        train_rows=(dict(params="decoder.embed.embedding", rows=("media", "eoc")),),
        data=dict(
            sources=sources,
            weights=dict(laion=2.0, mmc4=1.0),
            loss_weights=dict(laion=0.2, mmc4=1.0),
            template=dict(laion="laion_caption", mmc4="interleaved"),
            augment=dict(laion=("flip",)),
            too_long="truncate",
            seq_len=2048,
            max_patches=48,
            max_targets=2048,
            batch_size=batch_size,
            workers=8,
        ),
        optim=dict(
            lr=1e-4,
            schedule="constant",
            warmup=1875,
            weight_decay=0.1,
            decay=("cross.*",),
        ),
        eval=dict(template="open_flamingo_caption_prompt"),
        mesh=dict(fsdp=-1),
        checkpoint=dict(every=1000, keep=2),
    )
