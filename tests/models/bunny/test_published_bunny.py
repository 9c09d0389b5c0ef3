"""Bunny's published models at full size: every key of their files is claimed, none is missing."""

import json
import math

import pytest

from mmjax.models import opening, pretrained
from mmjax.parallel.mesh import use
from tests.models.published_files import linear, norm, write

TOWER = "model.vision_tower.vision_tower."
PHI2_ROWS, STABLELM_ROWS = 50295, 100289  # of their tokenizers, to which the peer cuts on merging


def total(shapes):
    return sum(map(math.prod, shapes.values()))


def phi(rows, d, layers, mlp, bias=False):
    """Phi; with the bias of its head as it is published, which Bunny leaves out."""
    out = {"model.embed_tokens.weight": (rows, d), **norm("model.final_layernorm", d)}
    out |= linear("lm_head", rows, d, bias)
    for i in range(layers):
        layer = f"model.layers.{i}"
        out |= norm(f"{layer}.input_layernorm", d)
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            out |= linear(f"{layer}.self_attn.{name}", d, d)
        out |= linear(f"{layer}.mlp.fc1", mlp, d) | linear(f"{layer}.mlp.fc2", d, mlp)
    return out


def like_llama(rows, d, layers, mlp, kv, norm_bias=False, qkv_bias=False):
    """LLaMA, and StableLM whose norms, queries, keys and values have biases."""
    out = {"model.embed_tokens.weight": (rows, d), **norm("model.norm", d, norm_bias)}
    out |= linear("lm_head", rows, d, False)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            out |= norm(f"{layer}.{name}", d, norm_bias)
        for name, width in (("q", d), ("k", kv), ("v", kv)):
            out |= linear(f"{layer}.self_attn.{name}_proj", width, d, qkv_bias)
        out |= linear(f"{layer}.self_attn.o_proj", d, d, False)
        for name in ("gate", "up"):
            out |= linear(f"{layer}.mlp.{name}_proj", mlp, d, False)
        out |= linear(f"{layer}.mlp.down_proj", d, mlp, False)
    return out


def siglip(layers=27, head=True):
    """so400m-patch14-384; the first release deleted its last layer and its pooling head."""
    d, f, root = 1152, 4304, f"{TOWER}vision_model."
    out = {f"{root}embeddings.patch_embedding.weight": (d, 3, 14, 14)}
    out |= {f"{root}embeddings.patch_embedding.bias": (d,)}
    out |= {f"{root}embeddings.position_embedding.weight": (729, d)}
    for i in range(layers):
        layer = f"{root}encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= linear(f"{layer}.self_attn.{name}", d, d)
        out |= linear(f"{layer}.mlp.fc1", f, d) | linear(f"{layer}.mlp.fc2", d, f)
        out |= norm(f"{layer}.layer_norm1", d) | norm(f"{layer}.layer_norm2", d)
    out |= norm(f"{root}post_layernorm", d)
    if head:
        head = f"{root}head."
        out |= {f"{head}probe": (1, 1, d), **norm(f"{head}layernorm", d)}
        out |= {f"{head}attention.in_proj_weight": (3 * d, d)}
        out |= {f"{head}attention.in_proj_bias": (3 * d,)}
        out |= linear(f"{head}attention.out_proj", d, d)
        out |= linear(f"{head}mlp.fc1", f, d) | linear(f"{head}mlp.fc2", d, f)
    return out


def eva():
    """EVA02_CLIP_L_336_psz14_s6B.pt, and of its text tower a few."""
    d, f = 1024, 2730
    out = {"logit_scale": (), "text.token_embedding.weight": (49408, 768)}
    out |= {"visual.cls_token": (1, 1, d), "visual.pos_embed": (1, 577, d)}
    out |= {"visual.patch_embed.proj.weight": (d, 3, 14, 14), "visual.patch_embed.proj.bias": (d,)}
    out |= norm("visual.norm", d) | linear("visual.head", 768, d)
    places = ["visual.rope."]
    for i in range(24):
        block = f"visual.blocks.{i}"
        out |= norm(f"{block}.norm1", d) | norm(f"{block}.norm2", d)
        for name in ("q_proj", "k_proj", "v_proj"):
            out |= linear(f"{block}.attn.{name}", d, d, False)
        out |= {f"{block}.attn.q_bias": (d,), f"{block}.attn.v_bias": (d,)}
        out |= norm(f"{block}.attn.inner_attn_ln", d) | linear(f"{block}.attn.proj", d, d)
        out |= linear(f"{block}.mlp.w1", f, d) | linear(f"{block}.mlp.w2", f, d)
        out |= norm(f"{block}.mlp.ffn_ln", f) | linear(f"{block}.mlp.w3", d, f)
        places.append(f"{block}.attn.rope.")
    return out | {f"{at}freqs_{name}": (576, 64) for at in places for name in ("cos", "sin")}


def projector(d_vision, d):
    return linear("model.mm_projector.0", d, d_vision) | linear("model.mm_projector.2", d, d)


def config(kind, d, layers, heads, mlp, d_vision, **more):
    return {
        "model_type": f"bunny-{kind}", "hidden_size": d, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": mlp, "mm_hidden_size": d_vision,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_aspect_ratio": "pad", "tokenizer_model_max_length": 2048, "eos_token_id": 0,
        **more,
    }  # fmt: skip


# so400m is published with 428,225,600 parameters, 15,238,352 of them in its pooling head, and
# 15,239,504 in each layer.
SO400M = 428_225_600 - 15_238_352
CUT = SO400M - 15_239_504
PROJECTOR = {2560: 9_507_840, 2048: 6_557_696, 4096: 30_941_184}  # by the language model's width
PUBLISHED = {
    # Phi-2 has 2,779,683,840, with the bias of its head; 905 rows of both tables are cut.
    "v1.0-3B": (
        phi(PHI2_ROWS, 2560, 32, 10240) | projector(1152, 2560) | siglip(26, head=False),
        config("phi", 2560, 32, 32, 10240, 1152, vocab_size=PHI2_ROWS, partial_rotary_factor=0.4),
        2_779_683_840 - 51_200 - 2 * 905 * 2560 + PROJECTOR[2560] + CUT,
        (PHI2_ROWS, 384, 729, 26),
    ),
    # StableLM-2-1.6B has 1,644,515,328; 63 rows of both tables are cut.
    "stablelm-2, SigLIP": (
        like_llama(STABLELM_ROWS, 2048, 24, 5632, 2048, True, True)
        | projector(1152, 2048) | siglip(),
        config("stablelm", 2048, 24, 32, 5632, 1152, vocab_size=STABLELM_ROWS,
               num_key_value_heads=32, use_qkv_bias=True, rope_pct=0.25),
        1_644_515_328 - 2 * 63 * 2048 + PROJECTOR[2048] + SO400M,
        (STABLELM_ROWS, 384, 729, 26),
    ),
    # Llama-3-8B has 8,030,261,248.
    "v1.1-Llama-3-8B, S2": (
        like_llama(128256, 4096, 32, 14336, 1024) | projector(3456, 4096) | siglip(),
        config("llama", 4096, 32, 32, 14336, 3456, vocab_size=128256, num_key_value_heads=8,
               rope_theta=5e5, rms_norm_eps=1e-5, use_s2=True, unfreeze_vision_tower=True,
               s2_scales="384,768,1152"),
        8_030_261_248 + PROJECTOR[4096] + SO400M,
        (128256, 1152, 729, 26),
    ),
}  # fmt: skip


def opened(path, **parts):
    """Open a model; fails unless every key has its parameter and every parameter its key."""
    source = opening.open_pretrained(path, **parts)
    with use():
        abstract = pretrained.abstract_params(source.family, source.config)
    shapes = pretrained.check(source, abstract)
    c = source.config
    about = (c.vocab_size, c.image_size, c.image_tokens, c.vision.layers_run)
    return source, total(shapes), about


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_size_and_every_key_is_claimed(name, tmp_path):
    shapes, hf, size, about = PUBLISHED[name]
    write(tmp_path / "model.safetensors", shapes)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    source, count, found = opened(tmp_path)
    assert (count, found) == (size, about)
    head = total({k: v for k, v in shapes.items() if ".vision_model.head." in k})
    assert total(shapes) == size + head and head in (0, 15_238_352)
    assert source.config.projector.d_vision == hf["mm_hidden_size"]


def test_phi_1_5_with_eva_from_their_own_files_and_a_projector(tmp_path):
    """1,418,270,720 parameters with the head's bias; of EVA's 304,432,832 all but its head's."""
    hf = config("phi", 2048, 24, 32, 8192, 1024, vocab_size=51200)
    (tmp_path / "lm").mkdir()
    write(tmp_path / "lm" / "model.safetensors", phi(51200, 2048, 24, 8192, bias=True))
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**hf, "model_type": "phi"}))
    write(tmp_path / "mm_projector.safetensors", projector(1024, 2048))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    tower = write(tmp_path / "EVA02_CLIP_L_336_psz14_s6B.safetensors", eva())
    source, count, found = opened(
        tmp_path / "mm_projector.safetensors", lm=tmp_path / "lm", vision=tower
    )
    assert found == (51200, 336, 576, 23) and source.config.vision.gated
    visual = {k: v for k, v in eva().items() if k.startswith("visual.") and ".rope." not in k}
    assert total(visual) == 304_432_832
    assert count == 1_418_270_720 - 51_200 + 6_295_552 + 304_432_832 - 768 * 1025
