"""OpenFlamingo's own model (open-flamingo 2.0.1) in miniature, on today's torch and transformers.

Its code runs as published. Around it this file puts back what its dependencies have changed
since: torchvision's operators on a CPU-only torch; open_clip's patch tokens, which left before
`ln_post` in the releases the published models were trained with (`final_ln_after_pool`); an
`attention_mask` that generate() leaves out when nothing is padded.
"""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

TOWER = dict(image_size=28, patch_size=14, width=16, layers=2, head_width=8)
TOWER_NAME = "ViT-28-tiny"
LANGUAGE_MODELS = ("mpt", "mosaic1b", "neox", "llama", "opt")
WIDTH, HEADS, LAYERS, POSITIONS = 32, 4, 4, 128
SPARE_ROWS = 272  # rows of a hub embedding beyond the tokenizer; the factory cuts them off
STEP = 1 / 64  # every weight is a multiple of it within int8, so bfloat16 holds it exactly
GAIN = 1.5  # of a matrix over its fan-in: attention far from uniform
EMBED = 0.5  # standard deviation of an embedding; smaller, and all tokens look alike
ATTN_GATE, FF_GATE = 45 * STEP, -26 * STEP  # about 0.7 and -0.4

# How MosaicGPT's own files name what transformers' MPT names otherwise, and RedPajama's its head.
MOSAIC = {
    ".norm_1.": ".ln_1.",
    ".norm_2.": ".ln_2.",
    ".ffn.up_proj.": ".mlp.mlp_up.",
    ".ffn.down_proj.": ".mlp.mlp_down.",
    "transformer.norm_f.": "transformer.ln_f.",
}
RENAMES = {"mosaic1b": MOSAIC, "neox": {"lm_head.": "embed_out."}}


def import_peer():
    """Return open_flamingo's factory module."""
    import_torchvision()
    from open_flamingo.src import factory

    mixin = factory.FlamingoLMMixin
    if not hasattr(mixin, "published_forward"):
        mixin.published_forward = mixin.forward
        mixin.forward = forward_without_mask
    return factory


def import_torchvision():
    """Import torchvision, of which only pure-Python parts are used."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # no C++ operators beside this torch
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # one that is collected takes its operators away
        forget("torchvision")


def forget(package):
    """Drop a half-imported package, so that the next import starts over."""
    import sys

    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        del sys.modules[name]


def forward_without_mask(self, input_ids, attention_mask=None, **rest):
    """Call the published forward, whose attention_mask has no default."""
    return self.published_forward(input_ids, attention_mask, **rest)


def build(lm, every, folder, parallel=False, seed=0):
    """Return (model, tokenizer): the peer with random weights, every tensor and gate at work.

    folder: receives `lm/` (weights, config and tokenizer as on a hub) and `towers/` (open_clip's
        json of the tower).
    parallel: NeoX with parallel residuals and partial rotation, as Pythia has it.
    """
    factory = import_peer()
    import open_clip

    generator = torch.Generator().manual_seed(seed)
    lm_folder, towers = os.path.join(folder, "lm"), os.path.join(folder, "towers")
    os.makedirs(towers, exist_ok=True)
    text = dict(context_length=8, vocab_size=64, width=16, heads=2, layers=1)
    tower = dict(embed_dim=24, quick_gelu=True, vision_cfg=TOWER, text_cfg=text)
    with open(os.path.join(towers, f"{TOWER_NAME}.json"), "w") as f:
        json.dump(tower, f)
    open_clip.add_model_config(towers)
    tokenizer = byte_tokenizer(with_pad=lm == "opt")
    tokenizer.save_pretrained(lm_folder)
    language = language_model(lm, len(tokenizer), parallel)
    fill(language, generator)
    language.save_pretrained(lm_folder)

    model, _, tokenizer = factory.create_model_and_transforms(
        clip_vision_encoder_path=TOWER_NAME,
        clip_vision_encoder_pretrained=None,
        lang_encoder_path=lm_folder,
        tokenizer_path=lm_folder,
        cross_attn_every_n_layers=every,
        use_local_files=True,
    )
    model.vision_encoder.final_ln_after_pool = True
    if lm == "mosaic1b":
        add_qk_norms(model.lang_encoder)
    for part in (model.vision_encoder, model.perceiver):
        fill(part, generator)
    for block in model.lang_encoder.gated_cross_attn_layers:
        if block is not None:
            fill(block, generator)
    if lm == "mosaic1b":
        for block in model.lang_encoder.old_decoder_blocks:
            fill(block.attn.q_ln, generator)
            fill(block.attn.k_ln, generator)
    redraw_new_rows(model.lang_encoder, tokenizer, generator)
    settings = model.lang_encoder.generation_config
    settings.pad_token_id = tokenizer.pad_token_id
    settings.use_cache = True  # MPT's own default is to compute everything again for each token
    return model.eval(), tokenizer


def fill(module, generator):
    """Draw all weights on the grid: matrices by fan-in, norm scales of both signs, small biases.

    With a last norm's scales all positive, a tied head would repeat its token for ever.
    """
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("gate"):
                value = torch.full(p.shape, ATTN_GATE if "attn" in name else FF_GATE)
            elif "embed" in name or "wte" in name:
                value = EMBED * noise
            elif p.ndim > 1:
                value = GAIN * noise * (p.numel() / p.shape[0]) ** -0.5
            else:
                value = noise if name.endswith("weight") else 0.2 * noise
            p.copy_(to_grid(value))


def to_grid(value):
    """Round to multiples of STEP that int8 holds."""
    return (value / STEP).round().clamp(-127, 127) * STEP


def redraw_new_rows(language, tokenizer, generator):
    """Draw the rows of the added tokens anew: the factory samples them, off the grid."""
    head, embedding = language.get_output_embeddings(), language.get_input_embeddings()
    first = tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    with torch.no_grad():
        for table, std in ((head.weight, GAIN * WIDTH**-0.5), (embedding.weight, EMBED)):
            noise = torch.randn(table[first:].shape, generator=generator)
            table[first:] = to_grid(std * noise)  # the two may be one: the embedding comes last


def byte_tokenizer(with_pad):
    """Return a tokenizer of bytes: 256 of them behind <unk>, </s> and, as OPT has it, <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "</s>"] + ["<pad>"] * with_pad
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a set: its own order changes by process
    vocab = {piece: i for i, piece in enumerate(special + letters)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    pad = {"pad_token": "<pad>"} if with_pad else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", **pad
    )


def language_model(lm, tokens, parallel):
    """Return one of transformers' language models, tiny. LLaMA has no spare rows, so it grows."""
    import transformers as hf

    rows = tokens if lm == "llama" else SPARE_ROWS
    names = dict(vocab_size=rows, eos_token_id=1, bos_token_id=1)
    usual = dict(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=POSITIONS,
        **names,
    )
    if lm in ("mpt", "mosaic1b"):
        sizes = dict(d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, max_seq_len=POSITIONS)
        return hf.MptForCausalLM(hf.MptConfig(**sizes, **names))
    if lm == "neox":
        rotary = 0.25 if parallel else 1.0
        return hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(
                intermediate_size=4 * WIDTH,
                use_parallel_residual=parallel,
                rotary_pct=rotary,
                **usual,
            )
        )
    if lm == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=88, **usual))
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH, dropout=0.0, pad_token_id=2, **usual
        )
    )


def add_qk_norms(language):
    """Give MPT the norms of MosaicGPT (MPT-1B); transformers' MPT ignores `qk_ln`."""
    for block in language.old_decoder_blocks:
        for name in ("q_ln", "k_ln"):
            norm = torch.nn.LayerNorm(WIDTH, bias=False).requires_grad_(False)
            block.attn.add_module(name, norm)
        normalise_qk(block.attn)


def normalise_qk(attention):
    """Put the norms behind the fused projection: over all of q and all of k, before heads part."""

    def hook(_, inputs, fused):
        q, k, v = fused.chunk(3, -1)
        return torch.cat([attention.q_ln(q), attention.k_ln(k), v], -1)

    if hasattr(attention, "qk_hook"):
        attention.qk_hook.remove()
    attention.qk_hook = attention.Wqkv.register_forward_hook(hook)


def published_name(lm, name):
    """Return the name that published files have for a tensor, None for one they do not have."""
    if ".old_decoder_blocks." in name or ".gated_cross_attn_layers." in name:
        return None  # the same tensors again, under the layers they stand in
    if lm == "mosaic1b" and "lm_head." in name:
        return None  # MosaicGPT multiplies by its embedding and has no head
    for ours, theirs in RENAMES.get(lm, {}).items():
        name = name.replace(ours, theirs)
    return name


def published_state(lm, state):
    """Return a state dict under published names."""
    named = ((published_name(lm, k), v) for k, v in state.items())
    return {k: v for k, v in named if k is not None}


def published_config(lm, language):
    """Return the config.json of a language model: transformers' own, or MosaicGPT's for MPT-1B."""
    if lm == "mosaic1b":
        return dict(
            model_type="mosaic_gpt",
            architectures=["MosaicGPT"],
            d_model=WIDTH,
            n_heads=HEADS,
            n_layers=LAYERS,
            mlp_ratio=4,
            max_seq_len=POSITIONS,
            vocab_size=language.config.vocab_size,
            alibi=True,
            alibi_bias_max=8,
            attn_qk_ln=True,
            attn_clip_qkv=None,
            no_bias=True,
            logit_scale=None,
        )
    config = language.config.to_dict()
    config.pop("_name_or_path", None)  # a temporary folder
    return config
