"""What the Bunny recipes share: two stages of training as published (He et al. 2024).

``:pretrain`` trains the projector alone, on captions, between a frozen tower and a frozen language
model. Behind it ``:finetune`` trains the whole language model with the projector, or ``:lora``
adapters of the language model and the whole projector, on instructions. ``:lora,tower`` or
``:finetune,tower`` trains the tower as well. What a stage leaves in ``WORKDIR/model`` is what the
next one starts from.

AdamW with the learning rates below, cosine, 3 % of warm-up, no weight decay, gradients clipped at
1; a step takes 256 samples, then 128, each in a row of its own. As in the peer's option
group_by_modality_length, which its scripts leave off, the samples of a step are of similar lengths,
so that its rows can be cut to one of ``data.lengths``; ``--config.data.group=None`` draws them as
its scripts do. steps = records / samples of a step: set them for your data.
"""

from typing import Any

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.recipes import toy_bunny
from mmjax.train.settings import RunSettings
from mmjax.types import MMJaxError

STAGES = ("pretrain", "finetune", "lora")

# The sizes to plan with, as config.json has them.
PHI_1_5 = dict(
    model_type="bunny-phi", hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
    num_attention_heads=32, partial_rotary_factor=0.5, vocab_size=51_200,
)  # fmt: skip
PHI_2 = dict(
    model_type="bunny-phi", hidden_size=2560, intermediate_size=10_240, num_hidden_layers=32,
    num_attention_heads=32, partial_rotary_factor=0.4, vocab_size=51_200,
)  # fmt: skip
STABLELM_2 = dict(
    model_type="bunny-stablelm", hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
    num_attention_heads=32, num_key_value_heads=32, partial_rotary_factor=0.25, use_qkv_bias=True,
    max_position_embeddings=4096, vocab_size=100_352,
)  # fmt: skip
LLAMA_3_8B = dict(
    model_type="bunny-llama", hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, rope_theta=500_000.0, rms_norm_eps=1e-5,
    max_position_embeddings=8192, vocab_size=128_256,
)  # fmt: skip
SIGLIP = dict(model_type="siglip_vision_model", feature_layer=-2)  # so400m-patch14-384
EVA02 = dict(model_type="eva02_clip", feature_layer=-2)  # EVA02_CLIP_L_336_psz14
_IMAGE = {"siglip_vision_model": 729, "eva02_clip": 576}  # tokens
ADAPTERS = dict(rank=128, alpha=256.0, dropout=0.05)


def stage(
    arg: str | None,
    name: str,
    language: dict[str, Any],
    tower: dict[str, Any],
    *,
    pretrain_lr: float,
    scales: str | None = None,
    **second: Any,
) -> ConfigDict:
    """Return the recipe of the stage that ``arg`` names, ``pretrain`` where it names none.

    language, tower: the sizes to plan with. scales: of S2. second: what ``instruct`` takes.
    ``quick`` shrinks any stage to a toy of random weights on generated data.
    """
    options = recipe_options(arg, quick=False, tower=False, **dict.fromkeys(STAGES, False))
    chosen = [one for one in STAGES if getattr(options, one)] or ["pretrain"]
    if len(chosen) > 1 or (options.tower and chosen == ["pretrain"]):
        raise MMJaxError(
            f"{name} takes one of {', '.join(STAGES)}, and tower beside the last two; got {arg!r}"
        )
    if chosen == ["pretrain"]:
        recipe = pretrain(language, tower, pretrain_lr)
    else:
        recipe = instruct(language, tower, chosen == ["lora"], options.tower, **second)
    recipe["name"] = name
    if scales:
        recipe["model"]["config"] |= dict(use_s2=True, s2_scales=scales)
    return fill(RunSettings, toy_bunny(recipe) if options.quick else recipe)


def pretrain(language: dict[str, Any], tower: dict[str, Any], lr: float) -> dict[str, Any]:
    """Return the first stage: the projector learns from captions."""
    recipe = _shared(language, tower, "square")
    recipe["model"]["parts"] = dict(
        lm="set model.parts.lm to the language model's folder",
        vision="set model.parts.vision to the tower's file or folder",
    )
    recipe["data"] |= dict(
        template="bunny_plain",
        lengths=(_IMAGE[tower["model_type"]] + 64, 1024, 1536),
        seq_len=2048,
        max_targets=512,
        batch_size=256,
    )
    recipe["optim"] |= dict(lr=lr)
    return recipe | dict(steps=7_812, accumulate=4, train=("projector.*",))


def instruct(
    language: dict[str, Any],
    tower: dict[str, Any],
    lora: bool,
    train_tower: bool,
    *,
    template: str = "bunny_chat",
    max_length: int = 2048,
    steps: int = 5_430,
    accumulate: int = 2,
    remat: str = "names",
    adapters: dict[str, Any] = ADAPTERS,
    lora_lr: float = 2e-4,
    end_token: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """Return the second stage: the language model and the projector learn from instructions.

    With ``adapters`` projector and tower have a tenth of ``lora_lr``. max_length: tokens of a
    sample. end_token: the text and the id of what ends an answer, where the language model's own
    files say another.
    """
    recipe = _shared(language, tower, "pad")
    model, optim = recipe["model"], recipe["optim"]
    model["remat"] = remat
    model["init"] = "set model.init to what :pretrain left, WORKDIR/model, or to a Bunny"
    model["config"]["tokenizer_model_max_length"] = max_length
    model["processor"]["model_max_length"] = max_length
    if end_token:
        model["processor"]["end_token"], model["config"]["eos_token_id"] = end_token
    recipe["data"] |= dict(
        template=template,
        lengths=tuple(n for n in (512, 1024, 1536, 2048, 3072) if n < max_length),
        seq_len=max_length,
        max_targets=max_length,  # an answer may fill a sample that is cut
        batch_size=128,
    )
    trained = ("projector.*", *(["vision.*"] if train_tower else []))
    if lora:
        rates = tuple(dict(params=part, lr=lora_lr / 10) for part in trained)
        optim |= dict(lr=lora_lr, rates=rates)
        recipe["lora"] = adapters
    else:
        optim |= dict(lr=2e-5)
        trained = ("decoder.*", *trained)
    return recipe | dict(steps=steps, accumulate=accumulate, train=trained)


def _shared(language: dict[str, Any], tower: dict[str, Any], aspect_ratio: str) -> dict[str, Any]:
    source = "set data.sources.train.path", "set data.sources.train.image_root"
    return dict(
        model=dict(
            family="bunny",
            config=dict(image_aspect_ratio=aspect_ratio),
            processor=dict(image_aspect_ratio=aspect_ratio),
            plan_config={**language, "vision_config": tower},
            quantize=("decoder.*",),  # with frozen_dtype nf4 or int8: the peer's tower stays whole
            remat="names",
        ),
        data=dict(
            sources=dict(train=dict(kind="json", path=source[0], image_root=source[1])),
            pack=False,
            group="modality",
            too_long="truncate",
            max_patches=1,
            workers=8,
        ),
        optim=dict(schedule="cosine", warmup=0.03, weight_decay=0.0),
        mesh=dict(fsdp=-1),
        checkpoint=dict(every=500, keep=2),
    )
