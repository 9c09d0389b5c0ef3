"""The vision tower that a Flamingo's checkpoint leaves out: CLIP, from a file of its own."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.models.json_files import read_json
from mmjax.types import MMJaxError
from mmjax.weights.reader import Reader, Renamed, open_reader

ROOT = "vision_encoder."
_HF = f"{ROOT}vision_model."

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
_OPENAI_WIDTHS = (768, 1024)
_UNSUPPORTED = ("timm_model_name", "attentional_pool", "no_ln_pre", "ls_init_value")


def open_tower(path: str | Path) -> tuple[Reader, str, dict[str, Any]]:
    """Return a tower's tensors under ``vision_encoder.``, its layout, and its folder's config.

    path: a state dict of open_clip, of a whole CLIP or of its visual part, or a folder of
        transformers' CLIPModel or CLIPVisionModel. A text tower is left out. layout: as for
        ``rules``. Raises MMJaxError for a file without a tower.
    """
    path = Path(path)
    reader = open_reader(path)
    keys = [key.removeprefix("module.") for key in reader.keys()]  # noqa: SIM118
    stated: dict[str, Any] = {}
    if path.is_dir():
        files = ("open_clip_config.json", "config.json")
        stated = next((found for name in files if (found := read_json(path, name))), {})
    if any("vision_model." in key for key in keys):
        return Renamed(reader, _from_transformers), "otter", stated
    if "embeddings.class_embedding" in keys:
        return Renamed(reader, lambda key: _HF + key), "otter", stated
    if not any(key.endswith("conv1.weight") for key in keys):
        raise MMJaxError(
            f"{path}: no CLIP tower: neither visual.conv1.weight, as open_clip names it, nor "
            f"vision_model.*, as transformers does; it begins with {', '.join(sorted(keys)[:3])}"
        )
    root = "visual." if "visual.conv1.weight" in keys else ""

    def rename(key: str) -> str | None:
        key = key.removeprefix("module.")
        return ROOT + key.removeprefix(root) if key.startswith(root) else None

    return Renamed(reader, rename), "openflamingo", stated


def _from_transformers(key: str) -> str | None:
    _, found, rest = key.partition("vision_model.")
    return _HF + rest if found else None


def tower_config(
    reader: Reader, layout: str, stated: Mapping[str, Any], asked: str | Path | None = None
) -> dict[str, Any]:
    """Return the ``vision_config`` of a tower: sizes off its tensors, the rest as it is said.

    reader: with the tower under ``vision_encoder.``. stated: a config.json of transformers.
    asked: a published tower's name, or a JSON file of open_clip's or transformers' form, which
        counts before ``stated``. Raises MMJaxError when what is said is not what the tensors are.
    """
    found = _measured(reader, layout)
    said = _asked(asked) if asked is not None else _from_json(stated)
    if (
        said.get("image_size", 0) // found["patch_size"] * found["patch_size"]
        == found["image_size"]
    ):
        found["image_size"] = said["image_size"]  # what a last whole patch leaves over is not seen
    where = f"--vision-config {asked}" if asked is not None else "its config.json"
    wrong = [f"{k} {said[k]} (the tensors: {n})" for k, n in found.items() if said.get(k, n) != n]
    if wrong:
        near = [name for name in _NAMED if _named(name).items() >= found.items()]
        raise MMJaxError(
            f"the vision tower is not what {where} says: {', '.join(wrong)}; "
            + (f"it has the sizes of {near[0]}" if near else "give the config it was trained with")
        )
    width = found["hidden_size"]
    if "num_attention_heads" not in said and width not in _OPENAI_WIDTHS:
        raise MMJaxError(
            f"the vision tower is {width} wide, and its heads cannot be read off its tensors; give "
            f"--vision-config: one of {', '.join(_NAMED)}, or a JSON file"
        )
    if "hidden_act" not in said:
        logging.getLogger(__name__).info("vision tower: QuickGELU, as OpenAI's CLIP was trained")
    defaults = {"num_attention_heads": width // 64, "hidden_act": "quick_gelu"}
    return {**defaults, **said, **found}


def _measured(reader: Reader, layout: str) -> dict[str, int]:
    """Read off a tower's tensors what they tell."""
    if layout == "otter":
        patch, table = f"{_HF}embeddings.patch_embedding.weight", "embeddings.position_embedding"
        table, block, up = f"{_HF}{table}.weight", f"{_HF}encoder.layers.", "mlp.fc1.weight"
    else:
        patch, table = f"{ROOT}conv1.weight", f"{ROOT}positional_embedding"
        block, up = f"{ROOT}transformer.resblocks.", "mlp.c_fc.weight"
    keys = set(reader.keys())
    lacks = [key for key in (patch, table, f"{block}0.{up}") if key not in keys]
    if lacks:
        raise MMJaxError(f"the vision tower lacks {', '.join(lacks)}; is its file complete?")
    width, _, side, _ = reader.shape(patch)
    layers = {int(m[1]) for key in keys if (m := re.match(rf"{re.escape(block)}(\d+)\.", key))}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "intermediate_size": reader.shape(f"{block}0.{up}")[0],
        "image_size": math.isqrt(reader.shape(table)[0] - 1) * side,
        "patch_size": side,
    }


def _named(name: str) -> dict[str, Any]:
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


def _asked(asked: str | Path) -> dict[str, Any]:
    """Read a tower's name, such as ``ViT-L-14-336`` or ``ViT-L/14@336px``, or a JSON file."""
    name = str(asked).lower().replace("/", "-").replace("@336px", "-336")
    plain = name.removesuffix("-quickgelu")
    if plain in _NAMED:
        quick = {"hidden_act": "quick_gelu"} if plain != name else {}
        return {**_named(plain), **quick}
    path = Path(asked)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise MMJaxError(
            f"--vision-config {asked} is no file and no tower of mmjax; one of "
            f"{', '.join(_NAMED)}, each with -quickgelu or not, or a JSON file of its sizes"
        )
    try:
        return _from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise MMJaxError(f"{path}: not the JSON of a vision tower ({error})") from error


def _from_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' words for a tower from its JSON there or in open_clip."""
    config = config.get("model_cfg", config)
    if "vision_cfg" not in config:
        config = config.get("vision_config") or config
        words = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        words += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
        return {key: config[key] for key in words if config.get(key) is not None}
    sizes = config["vision_cfg"]
    odd = [key for key in _UNSUPPORTED if sizes.get(key)]
    if odd or not isinstance(sizes.get("layers", 12), int):
        raise MMJaxError(
            f"vision_cfg has {', '.join(odd) or 'several stages'}: only CLIP's own ViT is supported"
        )
    width = sizes.get("width", 768)
    return {
        "hidden_size": width,
        "num_hidden_layers": sizes.get("layers", 12),
        "num_attention_heads": width // sizes.get("head_width", 64),
        "intermediate_size": int(width * sizes.get("mlp_ratio", 4.0)),
        "image_size": sizes.get("image_size", 224),
        "patch_size": sizes.get("patch_size", 16),
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
    }
