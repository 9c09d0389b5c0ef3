"""Captions of emoji: a small Flamingo learns the names of Google's drawings on a CPU.

COMMAND
    python -m mmjax.data.emoji                       # the pictures, 25 MB, once
    python train.py --config=configs/captions_cpu.py --workdir=runs/captions_cpu

It is asked for the names of Twitter's drawings of flags and food, none of which it has seen: alone,
and with two or four solved examples before the question. In training further pictures with their
names follow in the same sample, each text looking at the picture before it, so that examples at
test time are nothing new.
"""

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.data.emoji import captions
from mmjax.recipes import toy_flamingo
from mmjax.train.settings import RunSettings

CATEGORIES = ("Flags", "Food & Drink")
MODEL = dict(
    cross_attn_every_n_layers=1,
    text_config=dict(
        model_type="mpt", d_model=128, n_heads=4, n_layers=3, max_seq_len=256, vocab_size=64,
        initializer_range=0.05,
    ),
    vision_config=dict(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        image_size=32, patch_size=8, initializer_range=0.05,
    ),
    perceiver_config=dict(num_layers=1, num_heads=4, head_dim=32, num_latents=16, ff_mult=2),
    # Open gates: there is no pretrained language model to leave as it was.
    cross_config=dict(num_heads=4, head_dim=32, ff_mult=2, gate_init=0.7),
)  # fmt: skip


def task(shots: int) -> dict:
    """Return the question for each of Twitter's drawings, after so many of Google's."""
    google, twitter = (
        dict(kind="emoji", style=style, categories=CATEGORIES) for style in ("google", "twitter")
    )
    return dict(
        name=f"emoji_{shots}_shots",
        source=twitter,
        max_new_tokens=12,
        shots=shots,
        demos=google if shots else None,
    )


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` trains a toy on generated pictures."""
    quick = recipe_options(arg, quick=False).quick
    recipe = dict(
        name="captions_cpu",
        steps=1200,
        model=dict(
            family="flamingo",
            config=MODEL,
            words=() if quick else ("Output:", *captions(CATEGORIES)),
            dtype="float32",
            frozen_dtype="float32",
        ),
        data=dict(
            sources=dict(
                train=dict(kind="emoji", style="google", categories=CATEGORIES, variants=1000)
            ),
            template="open_flamingo_caption_chat",
            multiturn=dict(turns=4, max_tokens=96),
            seq_len=96,
            max_patches=12,
            max_targets=80,
            batch_size=12,
        ),
        optim=dict(lr=2e-3, warmup=0.05, schedule="cosine", b2=0.98, weight_decay=0.1),
        eval=dict(
            template="open_flamingo_caption_prompt",
            tasks=tuple(task(shots) for shots in (0, 2, 4)),
            every=400,
            limit=128,
            batch_size=64,
        ),
        checkpoint=dict(every=400),
        log=dict(every=20),
    )
    return fill(RunSettings, toy_flamingo(recipe) if quick else recipe)
