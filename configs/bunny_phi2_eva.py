"""Bunny: Phi-2 with EVA02-CLIP-L at 336 pixels.

COMMAND
    python train.py --config=configs/bunny_phi2_eva.py:pretrain \\
        --workdir=runs/bunny_phi2_eva_1 \\
        --config.model.parts.lm=/data/phi-2 \\
        --config.model.parts.vision=/data/EVA02_CLIP_L_336_psz14_s6B.pt \\
        --config.data.sources.train.path=/data/pretrain/bunny_pretrain_laion_2m.json \\
        --config.data.sources.train.image_root=/data/pretrain/images
    python train.py --config=configs/bunny_phi2_eva.py:lora \\
        --workdir=runs/bunny_phi2_eva_2 --config.model.init=runs/bunny_phi2_eva_1/model \\
        --config.data.sources.train.path=/data/finetune/bunny_695k.json \\
        --config.data.sources.train.image_root=/data/finetune/images

``:finetune`` in place of ``:lora`` trains the whole language model; what the stages are is in
configs/_bunny.py. Not measured: the authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs._bunny import EVA02, PHI_2, stage


def get_config(arg: str | None = None) -> ConfigDict:
    """Return ``pretrain``, ``finetune`` or ``lora``; ``:quick`` beside one makes a toy of it."""
    return stage(arg, "bunny_phi2_eva", PHI_2, EVA02, pretrain_lr=5e-5)
