"""Otter's own model in miniature, in the transformers that it pins, on a CPU.

Its code runs as published, from a checkout. Around it this file only stands in for the hub (a
tokenizer of bytes) and lets the resampler follow the tower's width, which the peer's class fixes
at 1024.
"""

import contextlib
import io
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from drawn_weights import draw
from flamingo_peer import byte_tokenizer

WIDTH, HEADS, LAYERS, POSITIONS = 32, 4, 4, 128
LANGUAGE_MODELS = {  # layers from one gated block on; frames that have an embedding
    "mpt": dict(every=2, frames=None),
    "mosaic1b": dict(every=4, frames=None),
    "llama": dict(every=4, frames=4),
}
SPARE_ROWS = 272  # of MPT's embedding, which the peer leaves as it is: 262 tokens and ten more
TOWER = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=28,
    patch_size=14,
    hidden_act="quick_gelu",
)
END = 1  # </s>


def import_peer(checkout):
    """Return the module of Otter's model from a checkout of its repository."""
    sys.path.insert(0, os.path.join(checkout, "src"))
    from otter_ai.models.otter import modeling_otter

    modeling_otter.AutoTokenizer = Hub
    owner = modeling_otter.OtterForConditionalGeneration
    owner.vis_dim = property(lambda self: self.config.vision_config.hidden_size, lambda *_: None)
    return modeling_otter


class Hub:
    """Stands in for the hub's tokenizers, of which the peer only asks ids of its own tokens."""

    @staticmethod
    def from_pretrained(_):
        """Return a tokenizer of bytes, whatever the name."""
        return byte_tokenizer(with_pad=False)


def build(modeling, lm, seed):
    """Return the peer's model with random weights, every tensor and gate at work."""
    about = LANGUAGE_MODELS[lm]
    config = modeling.OtterConfig(
        vision_config=dict(TOWER),
        text_config=text_config(lm),
        cross_attn_every_n_layers=about["every"],
        max_num_frames=about["frames"],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints each parameter
        model = modeling.OtterForConditionalGeneration(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(draw(name, tuple(tensor.shape), seed)))
    return model.eval()


def text_config(lm):
    """Return the language model's settings, those of the published files where sizes are not."""
    if lm == "mpt":
        attention = dict(alibi=True, alibi_bias_max=8, attn_impl="torch", prefix_lm=False)
        return dict(
            architectures=["MPTForCausalLM"],
            model_type="mpt",
            d_model=WIDTH,
            hidden_size=WIDTH,
            n_heads=HEADS,
            n_layers=LAYERS,
            expansion_ratio=4,
            max_seq_len=POSITIONS,
            vocab_size=SPARE_ROWS,
            no_bias=True,
            norm_type="low_precision_layernorm",
            use_cache=False,
            attn_config=attention,
        )
    if lm == "mosaic1b":
        return dict(
            architectures=["MosaicGPT"],
            model_type="mosaic_gpt",
            d_model=WIDTH,
            hidden_size=WIDTH,
            n_heads=HEADS,
            n_layers=LAYERS,
            mlp_ratio=4,
            max_seq_len=POSITIONS,
            vocab_size=262,
            no_bias=True,
            alibi=True,
            attn_qk_ln=True,
            attn_impl="torch",
            use_cache=False,
        )
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=WIDTH,
        intermediate_size=88,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-6,
        vocab_size=262,
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=0,
    )
