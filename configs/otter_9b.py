"""Otter: OpenFlamingo-9B tuned on MIMIC-IT, with in-context examples.

COMMAND
    python -m convert_weights.to_jax /data/OTTER-MPT7B-Init /data/otter
    python train.py --config=configs/otter_9b.py --workdir=runs/otter_9b \\
        --config.model.init=/data/otter --config.data.sources.train.path=/data/mimicit.yaml

The YAML is Otter's training YAML (docs/data_formats.md). As in its README for MPT: AdamW at 2e-5,
cosine, 1 % of warm-up, three epochs at a batch of 64; trained are the resampler, the gated blocks
and the embeddings, as its model freezes all else. Weight decay of 0.1 acts, as in its code, on the
gated blocks alone: on their kernels and, as it goes by names and that one is feed_forward.0, on the
scale of the norm before the MLP. steps = epochs * records / batch: set them for your data.

The images of an entry are the frames of one medium, as Otter has them; in-context examples have a
medium each. Pairs (SD, CGD) are media of two frames, and a model takes one number of frames: set
model.processor.frames and data.sources.train.frames to 2 for them. Rows begin as the tokenizer
begins them, with the spaces of Otter's inference, and pictures are cropped as there; its last
release trains with data.template=otter_tight_chat and
model.processor="{'answer_token': True, 'frames': 1, 'bos': True, 'fit': 'squash'}". Not measured:
the authors have not run this on GPUs.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.openflamingo_9b import MPT_7B
from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_flamingo
from mmjax.train.settings import RunSettings


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data."""
    quick = recipe_options(arg, quick=False).quick
    recipe = settings("otter_9b")
    return fill(RunSettings, toy_flamingo(recipe) if quick else recipe)


def settings(name: str, *, max_patches: int = 24, batch_size: int = 16) -> dict[str, Any]:
    """Return what the Otter recipes share."""
    return dict(
        name=name,
        steps=20_000,
        model=dict(
            family="flamingo",
            init="set model.init to a folder of convert_weights.to_jax",
            plan_config=dict(text_config=MPT_7B),
            processor=dict(answer_token=True, frames=1),
            remat="names",
        ),
        train=("perceiver.*", "cross.*", "decoder.embed.*"),
        data=dict(
            sources=dict(
                train=dict(
                    kind="mimicit_yaml",
                    path="set data.sources.train.path",
                    frames_as="medium",
                    frames=None,
                )
            ),
            template="otter_chat",
            seq_len=1024,
            max_patches=max_patches,
            max_targets=768,
            batch_size=batch_size,
            workers=8,
        ),
        optim=dict(
            lr=2e-5,
            schedule="cosine",
            warmup=0.01,
            weight_decay=0.1,
            decay=("cross.*kernel", "cross.mlp_norm.scale"),
        ),
        mesh=dict(fsdp=-1),
        checkpoint=dict(every=500, keep=2),
    )
