"""OpenFlamingo's published models at full size: every key of their files is claimed, none lacks."""

import json
import math

import pytest

from mmjax.models import exports, opening, pretrained
from mmjax.parallel.mesh import use
from tests.models.published_files import norm, write

PERCEIVER = 63_019_008  # parameters of the resampler, the same in all
ATTENTION = {"to_q": (512, None), "to_kv": (1024, 1024), "to_out": (None, 512)}


def perceiver():
    out = {"perceiver.latents": (64, 1024), **norm("perceiver.norm", 1024)}
    for i in range(6):
        layer = f"perceiver.layers.{i}"
        out |= norm(f"{layer}.0.norm_media", 1024) | norm(f"{layer}.0.norm_latents", 1024)
        out |= {f"{layer}.0.{k}.weight": tuple(n or 1024 for n in v) for k, v in ATTENTION.items()}
        out |= norm(f"{layer}.1.0", 1024)
        out |= {f"{layer}.1.1.weight": (4096, 1024), f"{layer}.1.3.weight": (1024, 4096)}
    return out


def gated(layers, every, count, d):
    out = {}
    for i in range(every - 1, count, every):
        block = f"lang_encoder.{layers}.{i}.gated_cross_attn_layer"
        out |= {f"{block}.attn_gate": (1,), f"{block}.ff_gate": (1,)}
        out |= norm(f"{block}.attn.norm", d) | norm(f"{block}.ff.0", d)
        out |= {f"{block}.attn.{k}.weight": tuple(n or d for n in v) for k, v in ATTENTION.items()}
        out |= {f"{block}.ff.1.weight": (4 * d, d), f"{block}.ff.3.weight": (d, 4 * d)}
    return out


def clip():
    """open_clip's ViT-L-14 whole; of its text tower a few."""
    out = {"positional_embedding": (77, 768), "token_embedding.weight": (49408, 768)}
    out |= {"logit_scale": (), "transformer.resblocks.0.attn.in_proj_weight": (2304, 768)}
    out |= {"visual.class_embedding": (1024,), "visual.positional_embedding": (257, 1024)}
    out |= {"visual.proj": (1024, 768), "visual.conv1.weight": (1024, 3, 14, 14)}
    out |= norm("visual.ln_pre", 1024) | norm("visual.ln_post", 1024)
    for i in range(24):
        block = f"visual.transformer.resblocks.{i}"
        out |= norm(f"{block}.ln_1", 1024) | norm(f"{block}.ln_2", 1024)
        sizes = {"attn.in_proj_": (3072, 1024), "attn.out_proj.": (1024, 1024)}
        sizes |= {"mlp.c_fc.": (4096, 1024), "mlp.c_proj.": (1024, 4096)}
        for name, shape in sizes.items():
            out |= {f"{block}.{name}weight": shape, f"{block}.{name}bias": shape[:1]}
    return out


def mpt(d, layers, rows, first, up, down, final, qk_norm):
    out = {"transformer.wte.weight": (rows, d), f"transformer.{final}.weight": (d,)}
    for i in range(layers):
        block = f"transformer.blocks.{i}"
        norms = [f"{first}_1", f"{first}_2"] + ["attn.q_ln", "attn.k_ln"] * qk_norm
        out |= {f"{block}.{name}.weight": (d,) for name in norms}
        out |= {f"{block}.attn.Wqkv.weight": (3 * d, d), f"{block}.attn.out_proj.weight": (d, d)}
        out |= {f"{block}.{up}.weight": (4 * d, d), f"{block}.{down}.weight": (d, 4 * d)}
    return out


def llama():
    d = 4096
    out = {"model.embed_tokens.weight": (32000, d), "lm_head.weight": (32000, d)}
    out |= {"model.norm.weight": (d,)}
    for i in range(32):
        layer = f"model.layers.{i}"
        out |= {f"{layer}.self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        out |= {f"{layer}.mlp.{x}_proj.weight": (11008, d) for x in ("gate", "up")}
        out |= {f"{layer}.mlp.down_proj.weight": (d, 11008)}
        out |= {f"{layer}.{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
        out |= {f"{layer}.self_attn.rotary_emb.inv_freq": (64,)}
    return out


def neox():
    d, out = 2560, {}
    out |= {"gpt_neox.embed_in.weight": (50432, 2560), "embed_out.weight": (50432, 2560)}
    out |= norm("gpt_neox.final_layer_norm", d)
    for i in range(32):
        layer = f"gpt_neox.layers.{i}"
        out |= norm(f"{layer}.input_layernorm", d) | norm(f"{layer}.post_attention_layernorm", d)
        sizes = {"attention.query_key_value": (3 * d, d), "attention.dense": (d, d)}
        sizes |= {"mlp.dense_h_to_4h": (4 * d, d), "mlp.dense_4h_to_h": (d, 4 * d)}
        for name, shape in sizes.items():
            out |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        out |= {f"{layer}.attention.bias": (1, 1, 2048, 2048)}
        out |= {
            f"{layer}.attention.masked_bias": (),
            f"{layer}.attention.rotary_emb.inv_freq": (40,),
        }
    return out


MPT_1B = {"model_type": "mosaic_gpt", "d_model": 2048, "n_heads": 16, "n_layers": 24,
          "mlp_ratio": 4, "vocab_size": 50432, "attn_qk_ln": True, "alibi": True}  # fmt: skip
MPT_7B = {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32,
          "expansion_ratio": 4, "vocab_size": 50432, "no_bias": True}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000,
         "num_hidden_layers": 32, "intermediate_size": 11008}  # fmt: skip
NEOX = {"model_type": "gpt_neox", "hidden_size": 2560, "num_attention_heads": 32, "rotary_pct": 1.0,
        "num_hidden_layers": 32, "intermediate_size": 10240, "vocab_size": 50432,
        "use_parallel_residual": False}  # fmt: skip


def version_1():
    """The keys of OpenFlamingo-9B-deprecated: both names of the blocks, and tables of angles."""
    blocks = gated("model.layers", 4, 32, 4096)
    again = {
        k.replace(".model.layers.", ".gated_cross_attn_layers.").replace(
            ".gated_cross_attn_layer.", "."
        ): v
        for k, v in blocks.items()
    }
    angles = {f"lang_encoder.model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,)
              for i in range(32)}  # fmt: skip
    table = {"lang_encoder.model.embed_tokens.weight": (32003, 4096)}
    return perceiver() | blocks | again | angles | table


ROWS = 50280
PUBLISHED = {
    "3B-vitl-mpt1b": (
        perceiver()
        | gated("transformer.blocks", 1, 24, 2048)
        | {"lang_encoder.transformer.wte.weight": (ROWS, 2048)},
        mpt(2048, 24, 50432, "ln", "mlp.mlp_up", "mlp.mlp_down", "ln_f", True), MPT_1B,
        (1, ROWS, 50278), 1_046_992_944, 0,
    ),
    "4B-vitl-rpj3b": (
        perceiver()
        | gated("gpt_neox.layers", 2, 32, 2560)
        | {"lang_encoder.gpt_neox.embed_in.weight": (ROWS, 2560)}
        | {"lang_encoder.embed_out.weight": (ROWS, 2560)},
        neox(), NEOX, (2, ROWS, 50278), PERCEIVER + 16 * 56_109_058 + ROWS * 2560, ROWS * 2560,
    ),
    "9B-vitl-mpt7b": (
        perceiver()
        | gated("transformer.blocks", 4, 32, 4096)
        | {"lang_encoder.transformer.wte.weight": (ROWS, 4096)},
        mpt(4096, 32, 50432, "norm", "ffn.up_proj", "ffn.down_proj", "norm_f", False), MPT_7B,
        (4, ROWS, 50278), 1_384_781_840, 0,
    ),
    "9B-deprecated": (version_1(), llama(), LLAMA, (4, 32003, 32001), 1_309_919_248, 32003 * 4096),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_claimed_and_the_trained_part_has_the_published_size(name, tmp_path):
    trained, language, config, (every, rows, media), size, head = PUBLISHED[name]
    (tmp_path / "lm").mkdir()
    write(tmp_path / "lm" / "model.safetensors", language)
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    opened = opening.open_pretrained(
        write(tmp_path / "checkpoint.safetensors", trained),
        lm=tmp_path / "lm",
        vision=write(tmp_path / "clip.safetensors", clip()),
    )
    c = opened.config
    assert (c.cross_every, c.vocab_size, c.media_token_id) == (every, rows, media)
    assert (c.vision.num_heads, c.vision.image_size, c.vision.activation) == (16, 224, "quick_gelu")
    with use():
        abstract = pretrained.abstract_params(opened.family, c)
    # Raises unless every key has its parameter and every parameter its key, in its shape.
    tensors, _ = exports.plan_export(opened, abstract, layout="openflamingo")
    counted = {t.key: math.prod(t.shape) for t in tensors}
    assert sum(counted.values()) == size + head
    assert counted.keys() - trained.keys() <= {"lang_encoder.lm_head.weight"}
    assert sum(n for k, n in counted.items() if k.startswith("perceiver.")) == PERCEIVER
