"""Bunny on easy-VQA, on a CPU: two parts, the projector between them, then questions.

COMMAND
    pip install 'mmjax[recipes]'
    R=configs/bunny_cpu.py W=runs/bunny_cpu
    python train.py --config=$R:parts    --workdir=$W/parts
    python train.py --config=$R:pretrain --workdir=$W/pretrain --config.model.init=$W/parts/model
    python train.py --config=$R:finetune --workdir=$W/finetune --config.model.init=$W/pretrain/model
    python train.py --config=$R:lora     --workdir=$W/lora     --config.model.init=$W/pretrain/model

Towers and language models this small are not published, so ``:parts`` makes them: a whole Bunny of
random weights learns captions of pictures ("a red circle"), and to answer questions about captions
that it is told in words. ``:pretrain``, the first stage, keeps its tower and its language model,
both frozen, and begins with another projector, of random weights, on captions. The second stage
asks about pictures, which no model before it was asked: ``:finetune`` trains the language model and
the projector, ``:lora`` adapters and the projector. The blind baselines stand beside the results.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.easyvqa import WORDS
from mmjax.config import fill, recipe_options
from mmjax.data.easyvqa import CAPTION_QUESTION
from mmjax.data.templates_bunny import SYSTEM
from mmjax.train.settings import RunSettings
from mmjax.types import MMJaxError

STAGES = ("parts", "pretrain", "finetune", "lora")
MODEL = dict(
    model_type="bunny-phi",
    vocab_size=64,  # the words decide
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.05,
    max_position_embeddings=512,
    mm_projector_type="mlp2x_gelu",
    vision_config=dict(
        model_type="siglip_vision_model",
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        initializer_range=0.05,
    ),
)
CAPTIONS = dict(kind="easyvqa_captions", split="train", placements=64)
QUESTIONS = dict(kind="easyvqa", split="train")


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe of a stage; ``:parts,quick`` shrinks the first to seconds."""
    options = recipe_options(arg, quick=False, **dict.fromkeys(STAGES, False))
    chosen = [one for one in STAGES if getattr(options, one)] or ["parts"]
    if len(chosen) > 1:
        raise MMJaxError(f"bunny_cpu takes one of {', '.join(STAGES)}; got {arg!r}")
    stage = dict(parts=parts, pretrain=pretrain, finetune=instruct, lora=adapted)[chosen[0]]
    return fill(RunSettings, stage(options.quick))


def parts(quick: bool) -> dict[str, Any]:
    """Return the run that makes a tower and a language model."""
    recipe = _recipe(steps=20 if quick else 900, lr=2e-3)
    recipe["model"] |= dict(
        config=MODEL, words=("USER: ASSISTANT:\n", SYSTEM, CAPTION_QUESTION, *WORDS)
    )
    recipe["data"] |= dict(
        sources=dict(captions=CAPTIONS, told=dict(QUESTIONS, told=True)),
        weights=dict(captions=0.8, told=0.2),
        template=dict(captions="bunny_plain", told="bunny_chat"),
    )
    return recipe | dict(eval=_asked("captions", 32 if quick else None))


def pretrain(quick: bool) -> dict[str, Any]:
    """Return the first stage: another projector, on captions."""
    recipe = _recipe(steps=20 if quick else 300, lr=2e-3)
    recipe["model"] |= dict(init="set model.init to what :parts left", fresh=("projector.*",))
    recipe["data"] |= dict(sources=dict(captions=CAPTIONS), template="bunny_plain")
    return recipe | dict(train=("projector.*",), eval=_asked("captions", 32 if quick else None))


def instruct(quick: bool) -> dict[str, Any]:
    """Return the second stage: questions, the language model trained whole."""
    recipe = _recipe(steps=20 if quick else 900, lr=1e-3)
    recipe["model"] |= dict(init="set model.init to what :pretrain left")
    recipe["data"] |= dict(
        sources=dict(
            open=dict(QUESTIONS, groups=("shape", "color"), placements=64),
            all=dict(QUESTIONS, placements=64),
        ),
        weights=dict(open=0.3, all=0.7),
        template="bunny_chat",
    )
    asked = _asked("questions", 32 if quick else None)
    return recipe | dict(train=("decoder.*", "projector.*"), eval=asked)


def adapted(quick: bool) -> dict[str, Any]:
    """Return the second stage with adapters; the projector's learning rate is lower."""
    recipe = instruct(quick)
    recipe["optim"] |= dict(lr=2e-3, rates=(dict(params="projector.*", lr=5e-4),))
    return recipe | dict(train=("projector.*",), lora=dict(rank=32, alpha=64.0))


def _recipe(steps: int, lr: float) -> dict[str, Any]:
    return dict(
        name="bunny_cpu",
        steps=steps,
        model=dict(family="bunny", dtype="float32", frozen_dtype="float32"),
        data=dict(seq_len=256, max_patches=12, max_targets=48, batch_size=8),
        optim=dict(lr=lr, schedule="cosine", warmup=0.03, b2=0.98, weight_decay=0.0),
        checkpoint=dict(every=150),
        log=dict(every=20),
    )


def _asked(what: str, limit: int | None) -> dict[str, Any]:
    """Return the questions to the test split's pictures, with what answers them blind."""
    captions = what == "captions"
    task = dict(
        name=what,
        source=dict(kind=CAPTIONS["kind"] if captions else QUESTIONS["kind"], split="test"),
        train=dict(CAPTIONS, placements=1) if captions else QUESTIONS,
        max_new_tokens=4 if captions else 2,
        limit=limit,
    )
    template = "bunny_plain_prompt" if captions else "bunny_prompt"
    return dict(template=template, tasks=(task,), batch_size=128)
