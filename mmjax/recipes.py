"""What recipes share: the magnifier's model, and the toy behind ``:quick`` of large models."""

from __future__ import annotations

from typing import Any

from mmjax.data.magnifier import LETTERS, QUESTION
from mmjax.data.templates_bunny import SYSTEM

WORDS = (QUESTION, "User: Assistant:", " ".join("0123456789"), " ".join(f"{a}." for a in LETTERS))
"""Every word of the magnifier's prompts and answers."""

MAGNIFIER_MODEL: dict[str, Any] = dict(
    family="fuyu",
    config=dict(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=8,
        initializer_range=0.05,
        max_position_embeddings=1024,
    ),
    words=WORDS,
    dtype="float32",
    frozen_dtype="float32",
)
"""A Fuyu that a CPU trains to read the magnifier's digits in minutes."""


def toy_fuyu(recipe: dict[str, Any]) -> dict[str, Any]:
    """Shrink a Fuyu recipe to seconds on a CPU: random weights, generated pictures, few steps.

    What the recipe says about optimizer, adapters, remat and accumulation stays as it is.
    """
    source = dict(kind="magnifier", split="train", image_size=32)
    test = dict(name="magnifier", source=source | dict(split="test"), limit=8, max_new_tokens=2)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=8,
    )
    model = {**recipe["model"], "init": None, "parts": {}, "config": sizes, "words": WORDS}
    return {
        **recipe,
        "steps": 10,
        "model": {**model, "dtype": "float32", "frozen_dtype": "float32"},
        "data": {
            **recipe["data"],
            "sources": dict(train=source),
            **dict(seq_len=128, max_patches=96, max_targets=16, batch_size=4, workers=0),
        },
        "eval": dict(tasks=(test,)),
        "checkpoint": dict(every=5),
        "log": dict(every=5),
    }


FLAMINGO_TOY: dict[str, Any] = dict(
    cross_attn_every_n_layers=2,
    text_config=dict(
        model_type="mpt",
        d_model=32,
        n_heads=4,
        n_layers=4,
        max_seq_len=128,
        vocab_size=320,  # as many as the words make: what is trained may be a `model.init`
    ),
    vision_config=dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    ),
    perceiver_config=dict(num_layers=2, num_heads=2, head_dim=16, num_latents=8),
    cross_config=dict(num_heads=2, head_dim=16),
)
"""A Flamingo of 130,000 parameters."""


def toy_flamingo(recipe: dict[str, Any]) -> dict[str, Any]:
    """Shrink a Flamingo recipe to seconds on a CPU, as ``toy_fuyu`` does.

    Its sources keep their names, and what the recipe says about them.
    """
    toy = toy_fuyu(recipe)
    (picture,) = toy["data"]["sources"].values()
    template = recipe["data"]["template"]
    chat = template if isinstance(template, str) and template.endswith("_chat") else None
    asked = chat.replace("_chat", "_prompt") if chat else "open_flamingo_caption_prompt"
    return {
        **toy,
        "model": {**toy["model"], "config": FLAMINGO_TOY},
        "data": {
            **toy["data"],
            "sources": {name: picture for name in recipe["data"]["sources"]},
            # In a document the question is learnt, too.
            **dict(seq_len=128, max_patches=4, max_targets=32),
        },
        "optim": {**recipe["optim"], "warmup": 0.1},
        "eval": {**toy["eval"], "template": asked},
    }


BUNNY_TOY: dict[str, Any] = dict(
    model_type="bunny-phi",
    vocab_size=384,  # as many as the words make: what is trained may be a `model.init`
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vision_config=dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    mm_projector_type="mlp2x_gelu",
)
"""A Bunny of 60,000 parameters."""

BUNNY_WORDS = (SYSTEM, "USER: ASSISTANT:\n", *WORDS)
"""Every word of a toy's prompts and answers."""


def toy_bunny(recipe: dict[str, Any]) -> dict[str, Any]:
    """Shrink a Bunny recipe to seconds on a CPU, as ``toy_fuyu`` does; of either stage, S2 too."""
    toy = toy_fuyu(recipe)
    model = {**toy["model"], "parts": {}, "words": BUNNY_WORDS}
    ratio = dict(image_aspect_ratio=recipe["model"]["config"]["image_aspect_ratio"])
    side = BUNNY_TOY["vision_config"]["image_size"]
    scales = dict(use_s2=True, s2_scales=f"{side},{2 * side}")
    scales = scales if recipe["model"]["config"].get("use_s2") else {}
    plain = recipe["data"]["template"] == "bunny_plain"
    return {
        **toy,
        "model": {**model, "config": BUNNY_TOY | ratio | scales, "processor": ratio},
        "data": {
            **toy["data"],
            "template": "bunny_plain" if plain else "bunny_chat",
            **dict(seq_len=128, max_patches=1, lengths=()),
        },
        "eval": {**toy["eval"], "template": "bunny_plain_prompt" if plain else "bunny_prompt"},
    }
