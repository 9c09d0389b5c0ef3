"""OpenFlamingo-9B: MPT-7B sees through CLIP ViT-L/14, a gated block before every fourth layer.

COMMAND
    python -m convert_weights.to_jax checkpoint.pt /data/of9b --lm /data/mpt-7b \\
        --vision /data/ViT-L-14.pt --vision-config ViT-L-14
    python train.py --config=configs/openflamingo_9b.py --workdir=runs/of9b \\
        --config.model.init=/data/of9b

From a language model and CLIP alone, as the published ones began, instead of a checkpoint:
    python train.py --config=configs/openflamingo_9b.py:parts --workdir=runs/of9b \\
        --config.model.parts.lm=/data/mpt-7b \\
        --config.model.parts.vision=/data/ViT-L-14.pt

Data and training are those of configs/openflamingo_3b.py, which says where they come from. Not
measured: the authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs.openflamingo_3b import get_recipe

MPT_7B = dict(model_type="mpt", d_model=4096, n_layers=32, n_heads=32, vocab_size=50_280)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; it takes what configs/openflamingo_3b.py takes."""
    return get_recipe(arg, "openflamingo_9b", MPT_7B, every=4, batch_size=16)
