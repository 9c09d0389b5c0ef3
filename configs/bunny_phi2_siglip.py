"""Bunny: Phi-2 with SigLIP so400m at 384 pixels.

COMMAND
    python train.py --config=configs/bunny_phi2_siglip.py:pretrain \\
        --workdir=runs/bunny_phi2_siglip_1 \\
        --config.model.parts.lm=/data/phi-2 \\
        --config.model.parts.vision=/data/siglip-so400m-patch14-384 \\
        --config.data.sources.train.path=/data/pretrain/bunny_pretrain_laion_2m.json \\
        --config.data.sources.train.image_root=/data/pretrain/images
    python train.py --config=configs/bunny_phi2_siglip.py:lora \\
        --workdir=runs/bunny_phi2_siglip_2 --config.model.init=runs/bunny_phi2_siglip_1/model \\
        --config.data.sources.train.path=/data/finetune/bunny_695k.json \\
        --config.data.sources.train.image_root=/data/finetune/images

``:finetune`` in place of ``:lora`` trains the whole language model; what the stages are is in
configs/_bunny.py. Not measured: the authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs._bunny import PHI_2, SIGLIP, stage


def get_config(arg: str | None = None) -> ConfigDict:
    """Return ``pretrain``, ``finetune`` or ``lora``; ``:quick`` beside one makes a toy of it."""
    return stage(arg, "bunny_phi2_siglip", PHI_2, SIGLIP, pretrain_lr=5e-4)
