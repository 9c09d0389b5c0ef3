"""Language models of published configs: their parameters are counted, none is allocated."""

import math

import pytest

from mmjax.models import pretrained, registry
from mmjax.models.language.architectures import ARCHITECTURES, architecture


def sizes(kind, vocab, d, layers, heads, mlp, **more):
    return dict(
        model_type=kind, vocab_size=vocab, hidden_size=d, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=mlp, **more,
    )  # fmt: skip


PUBLISHED = {
    "phi-2": (
        sizes("phi", 51200, 2560, 32, 32, 10240, partial_rotary_factor=0.4, hidden_act="gelu_new"),
        2_779_683_840,
    ),
    "phi-2 in Bunny": (
        sizes("phi", 51200, 2560, 32, 32, 10240, partial_rotary_factor=0.4, lm_head_bias=False),
        2_779_632_640,
    ),
    "phi-1.5": (sizes("phi", 51200, 2048, 24, 32, 8192), 1_418_270_720),
    "stablelm-2-1.6b": (
        sizes("stablelm", 100352, 2048, 24, 32, 5632, num_key_value_heads=32, use_qkv_bias=True),
        1_644_515_328,
    ),
    "qwen1.5-1.8b": (
        sizes(
            "qwen2", 151936, 2048, 24, 16, 5504, num_key_value_heads=16, rope_theta=1e6,
            sliding_window=32768, max_window_layers=21, use_sliding_window=False,
        ),
        1_836_828_672,
    ),
    "llama-3-8b": (
        sizes(
            "llama", 128256, 4096, 32, 32, 14336, num_key_value_heads=8, rope_theta=5e5,
            rope_scaling=None, rms_norm_eps=1e-5, eos_token_id=[128001, 128009],
        ),
        8_030_261_248,
    ),
    "phi-3-mini-4k": (
        sizes(
            "phi3", 32064, 3072, 32, 32, 8192, num_key_value_heads=32, sliding_window=2047,
            max_position_embeddings=4096, rope_scaling=None,
        ),
        3_821_079_552,
    ),
    "minicpm-2b": (
        sizes(
            "minicpm", 122753, 2304, 40, 36, 5760, num_key_value_heads=36, scale_emb=12,
            scale_depth=1.4, dim_model_base=256, rope_scaling=None,
        ),
        2_724_880_896,
    ),
    "gemma-2b": (
        sizes(
            "gemma", 256000, 2048, 18, 8, 16384, num_key_value_heads=1, head_dim=256,
            hidden_act="gelu",
        ),
        2_506_172_416,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_published_parameters(name):
    hf, published = PUBLISHED[name]
    family = registry.family("language")
    config = family.Config.from_hf(hf)
    params = pretrained.abstract_params(family, config)
    assert sum(math.prod(leaf.shape) for leaf in params.values()) == published
    assert family.Config.from_hf(config.to_hf()) == config


def test_the_switches_of_published_configs():
    of = {name: architecture(hf).read(hf) for name, (hf, _) in PUBLISHED.items()}
    assert of["phi-2"].rope_fraction * of["phi-2"].head_dim == 32 and of["phi-2"].head_bias
    assert of["phi-1.5"].rope_fraction == 0.5 and of["phi-1.5"].residual == "shared"
    assert of["stablelm-2-1.6b"].rope_fraction == 0.25 and not of["stablelm-2-1.6b"].out_bias
    assert of["qwen1.5-1.8b"].window is None and of["phi-3-mini-4k"].window == 2047
    assert of["llama-3-8b"].rope_scaling is None and of["llama-3-8b"].rope_theta == 5e5
    cpm = of["minicpm-2b"]
    assert (cpm.embed_scale, cpm.logit_scale) == (12, 1 / 9) and cpm.tied
    assert cpm.residual_scale == 1.4 / math.sqrt(40)
    assert of["gemma-2b"].embed_scale == math.sqrt(2048) and of["gemma-2b"].norm_plus_one


def test_a_window_saves_attention_alone():
    hf, _ = PUBLISHED["phi-3-mini-4k"]
    windowed = ARCHITECTURES["phi3"].read(hf)
    free = ARCHITECTURES["phi3"].read({**hf, "sliding_window": 262144})
    assert free.window is None
    assert windowed.work(2047) == free.work(2047)
    # Of 4096 queries those behind the window see 2047 keys; the others as many as their place.
    seen = (2047 * 2048 / 2 + 2049 * 2047) / 4096
    less = 4096 * 2.0 * 32 * 2 * 3072 * (4097 / 2 - seen)
    (_, all_keys, _), (_, some, _) = free.work(4096), windowed.work(4096)
    assert all_keys.scores - some.scores == pytest.approx(less) and all_keys.maps == some.maps
