"""Bunny-v1.1-Llama-3-8B-V: LLaMA-3-8B-Instruct with SigLIP so400m at 384, 768 and 1152 pixels (S2).

COMMAND
    python train.py --config=configs/bunny_llama3_8b_s2.py:pretrain \\
        --workdir=runs/bunny_llama3_8b_s2_1 \\
        --config.model.parts.lm=/data/Meta-Llama-3-8B-Instruct \\
        --config.model.parts.vision=/data/siglip-so400m-patch14-384 \\
        --config.data.sources.train.path=/data/pretrain/bunny_pretrain_laion_2m.json \\
        --config.data.sources.train.image_root=/data/pretrain/images
    python train.py --config=configs/bunny_llama3_8b_s2.py:lora \\
        --workdir=runs/bunny_llama3_8b_s2_a \\
        --config.model.init=runs/bunny_llama3_8b_s2_1/model \\
        --config.data.sources.train.path=/data/finetune/bunny_allava_1.3m.json \\
        --config.data.sources.train.image_root=/data/finetune/images
    python train.py --config=configs/bunny_llama3_8b_s2.py:lora,tower \\
        --workdir=runs/bunny_llama3_8b_s2_b --config.steps=15600 \\
        --config.model.init=runs/bunny_llama3_8b_s2_1/model \\
        --config.data.sources.train.path=/data/finetune/bunny_llava_allava_2m.json \\
        --config.data.sources.train.image_root=/data/finetune/images
    python -m convert_weights.average --out runs/bunny_llama3_8b_s2 \\
        runs/bunny_llama3_8b_s2_a/model:0.42 runs/bunny_llama3_8b_s2_b/model:0.58

As published: rank 256, 1e-4 and a tenth of it for projector and tower, samples of up to 4,096
tokens; the model is the average of two second stages. What the stages are is in configs/_bunny.py.
Not measured: the authors have not run this on GPUs.
"""

from ml_collections import ConfigDict

from configs._bunny import LLAMA_3_8B, SIGLIP, stage


def get_config(arg: str | None = None) -> ConfigDict:
    """Return ``pretrain``, ``finetune`` or ``lora``; ``:quick`` beside one makes a toy of it."""
    return stage(
        arg,
        "bunny_llama3_8b_s2",
        LLAMA_3_8B,
        SIGLIP,
        scales="384,768,1152",
        pretrain_lr=1e-3,
        template="bunny_llama_chat",
        max_length=4096,
        steps=10_156,
        accumulate=4,
        remat="full",
        adapters=dict(rank=256, alpha=256.0, dropout=0.05),
        lora_lr=1e-4,
        end_token=("<|end_of_text|>", 128_001),
    )
