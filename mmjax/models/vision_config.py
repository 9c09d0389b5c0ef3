"""A vision tower's config in the words of transformers, of open_clip, or by a published name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.models.stated_sizes import check_sizes
from mmjax.models.undone import tell_undone
from mmjax.models.vit import ViTConfig
from mmjax.nn.mlp import check_activation
from mmjax.types import MMJaxError

CLIP = ViTConfig()  # ViT-L/14
SIGLIP = ViTConfig(  # so400m-patch14-384
    d_model=1152, num_heads=16, num_kv_heads=16, head_dim=72, d_mlp=4304, num_layers=27,
    activation="gelu_tanh", norm_eps=1e-6, image_size=384, class_token=False, pre_norm=False,
    patch_bias=True,
)  # fmt: skip
EVA02 = ViTConfig(  # EVA02_CLIP_L_336_psz14
    d_mlp=2730, activation="silu", gated=True, norm_eps=1e-6, k_bias=False, sub_norm=True,
    rope_interleaved=True, rope_grid=16, image_size=336, pre_norm=False, patch_bias=True,
)  # fmt: skip

# By model_type. A config.json may leave out what all of a family share.
FAMILIES = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP, "eva02_clip": EVA02}
_KEYS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_mlp",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "pt_hw_seq_len": "rope_grid",
    "feature_layer": "feature_layer",
}
_ACTIVATIONS = dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")

# What open_clip calls them: width, layers, width of a head, of the MLP, patch, image, activation.
# OpenAI trained B and L, with QuickGELU; open_clip's own files of these names leave that unsaid,
# and its later releases build them with an exact GELU, which is another model.
_NAMED = {
    "vit-b-32": (768, 12, 64, 3072, 32, 224, "quick_gelu"),
    "vit-b-16": (768, 12, 64, 3072, 16, 224, "quick_gelu"),
    "vit-l-14": (1024, 24, 64, 4096, 14, 224, "quick_gelu"),
    "vit-l-14-336": (1024, 24, 64, 4096, 14, 336, "quick_gelu"),
    "vit-h-14": (1280, 32, 80, 5120, 14, 224, "gelu"),
}
NAMES = tuple(_NAMED)
_UNSUPPORTED = ("attentional_pool", "no_ln_pre", "ls_init_value")

# What timm calls SigLIP's: width, layers, width of a head and of the MLP by the size in the name,
# which goes on with patch and image.
_SIGLIPS = {
    "base": (768, 12, 64, 3072),
    "large": (1024, 24, 64, 4096),
    "so400m": (1152, 27, 72, 4304),
    "giantopt": (1536, 40, 96, 6144),
}
_SIGLIP = re.compile(rf"vit_({'|'.join(_SIGLIPS)})_patch(\d+)_siglip_(?:gap_)?(\d+)(?:\..*)?")
TIMM_SIGLIP = "vit_so400m_patch14_siglip_384"


def read_vision_config(hf: Mapping[str, Any]) -> ViTConfig:
    """Read a ``vision_config``; what it leaves out is the published tower's of its model_type.

    Without a model_type it is CLIP's. ``feature_layer`` is ours, -1 where it is not said. Raises
    MMJaxError for another family.
    """
    family = hf.get("model_type") or "clip_vision_model"
    if not isinstance(family, str) or family not in FAMILIES:
        raise MMJaxError(
            f"vision_config says model_type {family!r}, no vision tower of mmjax; one of "
            f"{', '.join(FAMILIES)}"
        )
    tell_undone(hf, f"vision_config of a {family}")
    check_sizes(hf, "vision_config")
    base = FAMILIES[family]
    sizes = {ours: hf[theirs] for theirs, ours in _KEYS.items() if hf.get(theirs) is not None}
    if "activation" in sizes:
        check_activation(sizes["activation"], "vision_config", *_ACTIVATIONS)
        sizes["activation"] = _ACTIVATIONS.get(sizes["activation"], sizes["activation"])
    width, heads = sizes.get("d_model", base.d_model), sizes.get("num_heads", base.num_heads)
    if width != base.d_model and "num_heads" not in sizes:
        raise MMJaxError(
            f"vision_config says hidden_size {width} and no num_attention_heads, which no tensor "
            "tells; state it in config.json, or give --vision-config"
        )
    if width % heads:
        raise MMJaxError(
            f"vision_config says hidden_size {width} and num_attention_heads {heads}, which does "
            "not divide it; correct config.json, or give --vision-config"
        )
    return dataclasses.replace(base, **sizes, num_kv_heads=heads, head_dim=width // heads)


def write_vision_config(config: ViTConfig) -> dict[str, Any]:
    """Return what ``read_vision_config`` reads as this config, and transformers too.

    Raises ValueError for a tower that is none of the published families.
    """
    out = {theirs: getattr(config, ours) for theirs, ours in _KEYS.items()}
    out = {key: value for key, value in out.items() if value is not None}
    hub = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    out["hidden_act"] = hub.get(config.activation, config.activation)
    for family in FAMILIES:
        said = {"model_type": family, **out}
        if read_vision_config(said) == config:
            # What a SigLIP pools its tokens with is not part of the model here.
            head = {"vision_use_head": False} if family == "siglip_vision_model" else {}
            return said | head
    raise ValueError(f"{config} has the switches of none of {', '.join(FAMILIES)}")


def named(name: str) -> dict[str, Any]:
    """Return the ``vision_config`` of one of ``NAMES``."""
    width, layers, head, mlp, patch, image, activation = _NAMED[name]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head,
        "intermediate_size": mlp,
        "image_size": image,
        "patch_size": patch,
        "hidden_act": activation,
    }


def asked_config(asked: str | Path) -> dict[str, Any]:
    """Read a tower's name, such as ``ViT-L-14-336`` or ``ViT-L/14@336px``, or a JSON file."""
    name = str(asked).lower().replace("/", "-").replace("@336px", "-336")
    plain = name.removesuffix("-quickgelu")
    if plain in _NAMED:
        quick = {"hidden_act": "quick_gelu"} if plain != name else {}
        return {**named(plain), **quick}
    if _SIGLIP.fullmatch(name):
        return _timm_config(name)
    path = Path(asked)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise MMJaxError(
            f"--vision-config {asked} is no file and no tower of mmjax; one of "
            f"{', '.join(_NAMED)}, each with -quickgelu or not, timm's name of a SigLIP such as "
            f"{TIMM_SIGLIP}, or a JSON file of its sizes"
        )
    try:
        return stated_config(json.loads(path.read_text("utf-8-sig")))
    except (ValueError, TypeError, AttributeError) as error:
        raise MMJaxError(f"{path}: not the JSON of a vision tower ({error})") from error


def stated_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' words for a tower from its JSON there, in open_clip, EVA-CLIP or timm.

    ``model_type`` is among them where it is said. Raises MMJaxError for a tower of open_clip that
    is neither CLIP's own ViT nor one that timm's name tells, and for another of timm.
    """
    if "architecture" in config:
        return _timm_config(str(config["architecture"]), config)
    config = config.get("model_cfg", config)
    if "vision_cfg" not in config:
        config = config.get("vision_config") or config
        keys = ("model_type", *_KEYS)
        return {key: config[key] for key in keys if config.get(key) is not None}
    sizes = config["vision_cfg"]
    if sizes.get("timm_model_name"):  # that name says the rest
        image = {"image_size": sizes["image_size"]} if "image_size" in sizes else {}
        return _timm_config(str(sizes["timm_model_name"])) | image
    odd = [key for key in _UNSUPPORTED if sizes.get(key)]
    if odd or not isinstance(sizes.get("layers", 12), int):
        raise MMJaxError(
            f"vision_cfg has {', '.join(odd) or 'several stages'}: only CLIP's own ViT, SigLIP "
            "and EVA-02 are supported"
        )
    width = sizes.get("width", 768)
    own = {"hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu"}
    if sizes.get("eva_model_name"):
        own = {"pt_hw_seq_len": sizes.get("pt_hw_seq_len", 16)}
    return {
        "hidden_size": width,
        "num_hidden_layers": sizes.get("layers", 12),
        "num_attention_heads": width // sizes.get("head_width", 64),
        "intermediate_size": int(width * sizes.get("mlp_ratio", 4.0)),
        "image_size": sizes.get("image_size", 224),
        "patch_size": sizes.get("patch_size", 16),
        **own,
    }


def _timm_config(name: str, config: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return transformers' words for a tower of timm by its name there, and what its JSON changes.

    config: as timm writes it beside weights, with ``pretrained_cfg`` and ``model_args``. SigLIP's
    activation is the tanh GELU it was trained with, although timm runs some of the names with the
    exact one. Raises MMJaxError for a tower that is neither a SigLIP nor an EVA-02.
    """
    if name.startswith("eva02_"):  # its tensors tell
        return {}
    match = _SIGLIP.fullmatch(name)
    if match is None:
        raise MMJaxError(
            f"timm's {name} is no vision tower of mmjax: of timm's, vit_*_patch*_siglip_* and "
            "eva02_*_clip_* are read"
        )
    width, layers, head, mlp = _SIGLIPS[match[1]]
    args, image = config.get("model_args") or {}, int(match[3])
    image = args.get("img_size") or (config.get("pretrained_cfg") or {}).get("input_size") or image
    sizes = {
        "model_type": "siglip_vision_model",
        "hidden_size": args.get("embed_dim", width),
        "num_hidden_layers": args.get("depth", layers),
        "num_attention_heads": args.get("num_heads", width // head),
        "intermediate_size": mlp,
        "image_size": image if isinstance(image, int) else image[-1],
        "patch_size": args.get("patch_size", int(match[2])),
    }
    if "act_layer" in args:
        sizes["hidden_act"] = args["act_layer"]
    if {"embed_dim", "mlp_ratio"} & set(args):
        del sizes["intermediate_size"]  # the tensors tell
    return sizes
