"""Bunny's own model in miniature, on today's transformers and torch on a CPU.

Its code runs as published, from a checkout. Around it this file puts back what its dependencies
have changed since (configurations whose __init__ was inherited, settings a configuration once had,
names that have gone), and stands in for packages of which it needs next to nothing (timm,
torchvision, xformers).
"""

import contextlib
import importlib
import inspect
import json
import os
import sys
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from flamingo_peer import to_grid

SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
HEADS = 4
TOWER_SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28)
PATCH, TOWER_MLP = 14, 48
S2_SCALES = (28, 56, 84)
EVA_SIZES = dict(image_size=28, layers=3, width=32, head_width=16)
EVA_OUT = 24  # of EVA's last projection, which is never used
END = 127  # bos, eos and pad, as the tokenizers of phi and StableLM have it
MAX_LENGTH = 64
GAIN = 1.5  # of a matrix over its fan-in: attention far from uniform
EMBED = 0.5  # standard deviation of an embedding

# The peer's file and class names, the language model's own settings, and those of the checkpoints
# it was made for that decide its shape.
LANGUAGE_MODELS = {
    "phi": ("bunny_phi", "BunnyPhi", dict(partial_rotary_factor=0.5)),
    "stablelm": (
        "bunny_stablelm",
        "BunnyStableLM",
        dict(num_key_value_heads=2, rope_pct=0.25, norm_eps=1e-5, use_qkv_bias=True),
    ),
    "qwen2": ("bunny_qwen", "BunnyQwen2", dict(num_key_value_heads=HEADS, rope_theta=1e6)),
    "llama": ("bunny_llama", "BunnyLlama", dict(num_key_value_heads=2, rope_theta=5e5)),
    "phi3": ("bunny_phi3", "BunnyPhi3", dict(pad_token_id=END)),
    "minicpm": (
        "bunny_minicpm",
        "BunnyMiniCPM",
        dict(scale_emb=12, scale_depth=1.4, dim_model_base=16),
    ),
}
TOWERS = {
    "siglip": "siglip-tiny",
    "clip": "clip-tiny",
    "eva": "EVA02_CLIP_tiny.pt",
    "s2": "siglip-tiny",  # at several scales
}


def import_peer(checkout):
    """Make `bunny` importable from a checkout, without what its packages import on their own."""
    stand_in("torchvision.transforms.functional", "InterpolationMode")
    stand_in("torchvision.ops.misc", "SqueezeExcitation")
    stand_in("torchvision.models.mobilenetv3", "InvertedResidual", "InvertedResidualConfig")
    stand_in("timm.layers.norm_act", "LayerNormAct2d")
    layers = stand_in("timm.models.layers", "drop_path")
    layers.to_2tuple = lambda n: (n, n)
    layers.trunc_normal_ = torch.nn.init.trunc_normal_
    stand_in("xformers.ops").memory_efficient_attention = attention
    for name in ("is_flax_available", "is_torch_fx_available"):
        for module in (transformers.utils, transformers.utils.import_utils):
            setattr(module, name, lambda: False)
    transformers.pytorch_utils.is_torch_greater_or_equal_than_1_13 = True
    transformers.PretrainedConfig.pad_token_id = None
    transformers.PretrainedConfig.use_return_dict = True
    sys.path.insert(0, checkout)
    model = types.ModuleType("bunny.model")  # its own __init__ imports every language model
    model.__path__ = [os.path.join(checkout, "bunny", "model")]
    sys.modules["bunny.model"] = model


def stand_in(name, *classes):
    """Register an empty package of this name and its parents, and empty classes in it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            sys.modules[path] = types.ModuleType(path)
            sys.modules[path].__path__ = []
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[path])
    for cls in classes:
        setattr(sys.modules[name], cls, type(cls, (), {}))
    return sys.modules[name]


def attention(q, k, v, p, scale):
    """Stand in for xformers' attention, which has [rows, tokens, heads, head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=scale)
    return out.transpose(1, 2)


def build(language, tower, seed):
    """Return the peer's model with random weights, every tensor at work and the tower unfrozen.

    Runs in an empty current folder: the tower's files lie there under the name that the
    configuration gives, by which the peer knows its kind.
    """
    write_tower(tower)
    classes = peer_classes(language)
    config = classes.config(**settings(language, tower))
    config._attn_implementation = "eager"
    model = classes.model(config)
    model.get_vision_tower().load_model()
    model.requires_grad_(True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


def peer_classes(language):
    """Return the peer's classes for a language model, made to work with today's transformers."""
    file, name, _ = LANGUAGE_MODELS[language]
    encoder = "bunny.model.multimodal_encoder"
    for kind, processor in (("siglip", "Siglip"), ("clip", "CLIP")):
        module = importlib.import_module(f"{encoder}.{kind}.{kind}_encoder")
        setattr(module, f"{processor}ImageProcessor", NoProcessor)
    eva = importlib.import_module(f"{encoder}.eva_clip.eva_clip_encoder")
    eva.EvaClipImageTrainProcessor = lambda size: None
    vit = importlib.import_module(f"{encoder}.eva_clip.eva_vit")
    vit._build_vision_tower = tiny(vit._build_vision_tower)
    module = importlib.import_module(f"bunny.model.language_model.{file}")
    config, model = getattr(module, f"{name}Config"), getattr(module, f"{name}ForCausalLM")
    parent = config.__mro__[1]
    config.__init__ = parent.__init__
    model._tied_weights_keys = {}
    vendored = sys.modules[model.__mro__[1].__module__]
    for cls in vars(vendored).values():
        if inspect.isclass(cls) and cls.__module__ == vendored.__name__:
            repair(cls)
    return types.SimpleNamespace(config=config, model=model)


def repair(cls):
    """Undo what a newer transformers makes of a vendored class."""
    if hasattr(cls, "_tied_weights_keys"):
        cls._tied_weights_keys = {}  # once a list
    if "_init_rope" in vars(cls) and not hasattr(cls, "published_init_rope"):
        cls.published_init_rope = cls._init_rope
        cls._init_rope = plain_rope


def plain_rope(attention):
    """Let the published method see a rope_scaling of None; today it names rope_parameters."""
    config = attention.config
    attention.rope_scaling = None
    attention.config = types.SimpleNamespace(**vars_of(config), rope_scaling=None)
    attention.published_init_rope()
    attention.config = config


def vars_of(config):
    names = ("rope_theta", "rope_pct", "max_position_embeddings")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


class NoProcessor:
    """Stand in for an image processor: pictures come as numbers here."""

    def __init__(self):
        self.size = {}  # S2 writes its own there

    @classmethod
    def from_pretrained(cls, name):
        return cls()


def tiny(build_tower):
    """Return EVA's builder with this file's sizes in place of the one set it is published with."""

    def build(vision_tower_path, embed_dim, vision_cfg):
        with contextlib.redirect_stdout(None):  # it lists what the file lacks
            return published(vision_tower_path, EVA_OUT, vision_cfg | EVA_SIZES)

    published = getattr(build_tower, "published", build_tower)
    build.published = published
    return build


def write_tower(tower):
    """Write a tower's files into the current folder, for the peer to load."""
    name = TOWERS[tower]
    if tower == "eva":
        torch.save({"visual.cls_token": torch.zeros(1, 1, EVA_SIZES["width"])}, name)
        return
    family = "CLIP" if tower == "clip" else "Siglip"
    sizes = dict(patch_size=PATCH, intermediate_size=TOWER_MLP, **TOWER_SIZES)
    config = getattr(transformers, f"{family}VisionConfig")(**sizes)
    getattr(transformers, f"{family}VisionModel")(config).save_pretrained(name)


def image_side(config):
    """Return the pixels of a picture's side as the peer's model takes it."""
    return max(S2_SCALES) if config.use_s2 else TOWER_SIZES["image_size"]


def settings(language, tower):
    """Return what the peer's configuration is made of."""
    own, scales = SIZES | LANGUAGE_MODELS[language][2] | dict(use_s2=False), (1,)
    if tower == "s2":
        scales = S2_SCALES
        own |= dict(use_s2=True, s2_scales=",".join(map(str, scales)))
        own["num_hidden_layers"] = 1  # its pictures make the file large enough
    return dict(
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        bos_token_id=END,
        eos_token_id=END,
        mm_vision_tower=TOWERS[tower],
        mm_hidden_size=TOWER_SIZES["hidden_size"] * len(scales),
        mm_projector_type="mlp2x_gelu",
        mm_projector_lr=2e-5,
        use_mm_proj=True,
        tune_mm_mlp_adapter=False,
        freeze_mm_mlp_adapter=False,
        unfreeze_vision_tower=True,
        image_aspect_ratio="pad",
        tokenizer_model_max_length=MAX_LENGTH,
        tokenizer_padding_side="right",
        **own,
    )


def fill(module, generator):
    """Draw all weights on the grid: matrices by fan-in, norm scales of both signs, small biases."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if any(part in name for part in ("embed_tokens", "position_embedding", "pos_embed")):
                value = EMBED * noise
            elif p.ndim > 1 and p.numel() > p.shape[-1]:
                value = GAIN * noise * (p.numel() / p.shape[0]) ** -0.5
            else:
                value = noise if name.endswith("weight") else 0.2 * noise
            p.copy_(to_grid(value))


def published_state(model):
    """Return the weights under the names of merged checkpoints, without shared ones."""
    state = {published_name(k): v for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def published_name(name):
    """Return a tensor's name in published files; transformers has since dropped a level of it."""
    root = "model.vision_tower.vision_tower."
    if name.startswith(root) and not name.startswith((root + "vision_model.", root + "model.")):
        return root + "vision_model." + name.removeprefix(root)
    return name


def published_config(model, language, tower):
    """Return config.json as the peer saved it: the arguments of its class, and what it adds."""
    cls = type(model.config)
    names = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "kwargs")]
    config = {name: getattr(model.config, name) for name in names}
    config |= {"rope_scaling": None} if "rope_scaling" in names else {}
    return (
        config
        | settings(language, tower)
        | dict(
            model_type=cls.model_type,
            architectures=[type(model).__name__],
            torch_dtype="float32",
            transformers_version="4.36.2",
        )
    )


def tower_config(tower):
    """Return the configuration beside a tower's weights: its config.json, or EVA-CLIP's own."""
    if tower == "eva":
        vit = sys.modules["bunny.model.multimodal_encoder.eva_clip.eva_vit"]
        config = vit.Eva2LargePlusEncoder(TOWERS[tower]).config
        return dict(embed_dim=EVA_OUT, vision_cfg=config["vision_cfg"] | EVA_SIZES)
    with open(os.path.join(TOWERS[tower], "config.json")) as f:
        return json.load(f)
