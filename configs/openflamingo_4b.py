"""OpenFlamingo-4B: RedPajama-3B sees through CLIP ViT-L/14, a gated block every second layer.

COMMAND
    python -m convert_weights.to_jax checkpoint.pt /data/of4b \\
        --lm /data/RedPajama-INCITE-Base-3B-v1 --vision /data/ViT-L-14.pt --vision-config ViT-L-14
    python train.py --config=configs/openflamingo_4b.py --workdir=runs/of4b \\
        --config.model.init=/data/of4b

From a language model and CLIP alone, as the published ones began, instead of a checkpoint:
    python train.py --config=configs/openflamingo_4b.py:parts --workdir=runs/of4b \\
        --config.model.parts.lm=/data/RedPajama-INCITE-Base-3B-v1 \\
        --config.model.parts.vision=/data/ViT-L-14.pt

Data and training are those of configs/openflamingo_3b.py, which says where they come from. Not
measured: the authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs.openflamingo_3b import get_recipe

REDPAJAMA_3B = dict(
    model_type="gpt_neox", hidden_size=2560, num_hidden_layers=32, num_attention_heads=32,
    intermediate_size=10_240, use_parallel_residual=False, rotary_pct=1.0, vocab_size=50_280,
)  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; it takes what configs/openflamingo_3b.py takes."""
    return get_recipe(arg, "openflamingo_4b", REDPAJAMA_3B, every=2, batch_size=16)
