"""Otter on video: a medium is 32 frames, each with an embedding of its own.

COMMAND
    python -m convert_weights.to_jax /data/OTTER-Video-LLaMA7B-DenseCaption /data/otter_video
    python train.py --config=configs/otter_video.py --workdir=runs/otter_video \\
        --config.model.init=/data/otter_video --config.data.sources.train.path=/data/mimicit.yaml

The checkpoint has frame embeddings (max_num_frames 128); 32 frames are taken from a video at even
distances, and what has fewer repeats some: every entry then makes media of as many frames as the
model takes. For another number set model.processor.frames and data.sources.train.frames alike.
Training is that of configs/otter_9b.py, and of the head; an MPT's head is its embedding, and is
trained with that one: --config.train="('perceiver.*', 'cross.*', 'decoder.embed.*')". Not
measured: the authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs.otter_9b import settings
from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_flamingo
from mmjax.train.settings import RunSettings

FRAMES = 32
LLAMA_7B = dict(
    model_type="llama", hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
    num_attention_heads=32, vocab_size=32_004,
)  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy of random weights on generated data."""
    quick = recipe_options(arg, quick=False).quick
    recipe = settings("otter_video", max_patches=2, batch_size=8)
    if quick:
        return fill(RunSettings, toy_flamingo(recipe))
    recipe["train"] += ("decoder.head.*",)  # LLaMA's is not its embedding, and Otter trains both
    recipe["model"]["processor"] |= dict(frames=FRAMES)
    recipe["data"]["sources"]["train"] |= dict(frames=FRAMES)
    recipe["model"]["plan_config"] = dict(text_config=LLAMA_7B, max_num_frames=128)
    return fill(RunSettings, recipe)
