"""config.json of Flamingos small enough to train in a test."""

import dataclasses

from mmjax.train.settings import ModelSettings

TOWER = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    image_size=8, patch_size=4,
)  # fmt: skip
TEXT = {
    "mpt": dict(d_model=16, n_heads=2, n_layers=2, max_seq_len=64, vocab_size=320),
    "llama": dict(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=32, vocab_size=320,
    ),
}  # fmt: skip


def hf_config(language="mpt"):
    """A Flamingo with two layers of this language model, a gated block before each."""
    return dict(
        model_type="flamingo",
        cross_attn_every_n_layers=1,
        text_config=dict(TEXT[language], model_type=language),
        vision_config=TOWER,
        perceiver_config=dict(num_layers=1, num_heads=2, head_dim=8, num_latents=4),
        cross_config=dict(num_heads=2, head_dim=8),
    )


WORDS = ("User: GPT: what is it? a red blue circle square", "### Human: ### Assistant:")
MODEL = ModelSettings(
    family="flamingo", config=hf_config(), words=WORDS, dtype="float32", frozen_dtype="float32"
)


def model(language="mpt", **changes):
    """Settings of such a model with random weights."""
    return dataclasses.replace(MODEL, config=hf_config(language), **changes)
