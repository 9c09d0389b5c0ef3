"""Put a Bunny together: its language model, its vision tower, and the projector between them.

The peer's files name the tower by a path and leave it out, its first stage saves the projector
alone, its adapters lie beside neither. What a folder holds is told by its tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.tokenize import load_tokenizer
from mmjax.models.bunny import projector
from mmjax.models.bunny.config import (
    MODEL_TYPES,
    PREFIX,
    BunnyConfig,
    architecture_of,
)
from mmjax.models.bunny.processor_config import s2_scales, seen_by_tower
from mmjax.models.json_files import read_json
from mmjax.models.language import weights as language
from mmjax.models.language.architecture import Architecture
from mmjax.models.language.architectures import ARCHITECTURES, architecture, told_by
from mmjax.models.parts import Assembled, Parts, differing
from mmjax.models.towers import Tower, open_tower, tower_in
from mmjax.models.vision_config import read_vision_config, write_vision_config
from mmjax.models.vit import ViTConfig
from mmjax.types import MMJaxError
from mmjax.weights.reader import Overlay, Reader, Renamed, open_reader

PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower.vision_tower."
READ_ALONE = ("open_clip", "timm_siglip")  # layouts of a tower in which no Bunny is written
FEATURE_LAYER = -2  # of every tower, whatever its family
_LAYOUTS = {
    "siglip_vision_model": "hf_siglip",
    "clip_vision_model": "hf_clip",
    "eva02_clip": "eva",
}
# By which the peer tells a tower's kind from its name, in this order.
_MARKS = {"sig": "siglip_vision_model", "eva": "eva02_clip", "clip": "clip_vision_model"}
_ROOTS = {"eva": f"{TOWER}model.", **dict.fromkeys(READ_ALONE, TOWER)}


def tower_root(layout: str) -> str:
    """Return what stands before a tower's tensors in a Bunny, by the tower's layout."""
    return _ROOTS.get(layout, f"{TOWER}vision_model.")


def tower_layout(vision: ViTConfig) -> str:
    """Return the layout in which a Bunny holds a tower."""
    return _LAYOUTS[write_vision_config(vision)["model_type"]]


def assemble(
    readers: Sequence[Reader], layout: str, hf: Mapping[str, Any], parts: Parts
) -> Assembled:
    """Return the whole model that some files and the other parts make.

    readers: in the names of ``to_hub``, the last counts; without any, the projector is fresh. hf:
    the config.json beside them, or {}. Raises MMJaxError, before any tensor is read, when parts are
    missing or do not fit.
    """
    own = Overlay(*readers)
    where = ",".join(map(str, dict.fromkeys(own.files))) or str(parts.lm or parts.vision)
    if parts.tuning_config is not None:
        raise MMJaxError(f"{where}: a Bunny has no tuning config; leave --tuning-config away")
    name, text, lm = _language_model(own, hf, parts.lm, where)
    tower = _tower(own, hf, parts, where)
    root = tower_root(tower.layout)
    vision = Renamed(tower.reader, lambda key: root + key)
    rest = Renamed(own, lambda key: None if key.startswith(TOWER) else key)
    whole = Overlay(*([lm] if lm else []), vision, rest)
    rows, d_model = _table(whole, ARCHITECTURES[name], where)
    connector = _projector(own, hf, tower, d_model, where)
    out = {**text, **hf, **connector, "model_type": PREFIX + name, "vision_config": tower.config}
    out["vocab_size"] = rows
    if hf.get("unfreeze_vision_tower") and not _holds(own, TOWER):
        out["unfreeze_vision_tower"] = False
        logging.getLogger(__name__).warning(
            f"{where}: config.json says that the vision tower was trained (unfreeze_vision_tower), "
            f"and no tower is inside; taking the one in {tower.reader.files[0]}"
        )
    folders = [Path(parts.lm)] if parts.lm is not None else []
    if out.get("eos_token_id") is None:  # so in some files of Phi
        near = [*(file.parent for file in own.files), *folders]
        out["eos_token_id"] = text.get("eos_token_id") or _end_of_text(near, where)
    fresh = () if _holds(own, PROJECTOR) else ("projector.*",)
    odd = [tower.layout] if tower.layout in READ_ALONE else []
    odd += [language.FUSED] if language.detect_layout(whole.keys()) == language.FUSED else []
    return Assembled(
        out,
        whole,
        "+".join(["bunny", *odd]),
        fresh=fresh if connector["mm_projector_type"] != "identity" else (),
        options=_seen(out),
        folders=tuple(folders),
    )


def _holds(reader: Reader, root: str) -> bool:
    return any(key.startswith(root) for key in reader.keys())  # noqa: SIM118


def _language_model(
    own: Reader, hf: Mapping[str, Any], folder: str | Path | None, where: str
) -> tuple[str, dict[str, Any], Reader | None]:
    """Return the language model's architecture and config, and its tensors if given apart."""
    stated = architecture_of(hf) if str(hf.get("model_type")).startswith(PREFIX) else None
    rest = [key for key in own.keys() if not key.startswith((PROJECTOR, TOWER))]  # noqa: SIM118
    inside = told_by(rest)
    if folder is None:
        if stated is None:
            raise MMJaxError(
                f"{where}: no config.json of a Bunny beside it; "
                + (
                    "copy it there, it tells sizes that no tensor does"
                    if inside
                    else "give the folder of its language model with --lm DIR"
                )
            )
        if inside is None:
            raise MMJaxError(
                f"{where}: holds no language model; give the folder of the one it was trained "
                f"with, a {stated} model, with --lm DIR"
            )
        return stated, {}, None
    if inside is not None:
        raise MMJaxError(
            f"{where}: holds a language model of its own ({inside.model_type}); leave --lm away"
        )
    folder = Path(folder)
    text = read_json(folder, "config.json")
    if text is None or "mmjax" in text:
        raise MMJaxError(
            f"--lm {folder}: give the language model's folder as on Hugging Face, with config.json "
            "and its weights; " + ("this one is converted" if text else "there is no config.json")
        )
    found = architecture(text)
    name = found.model_type
    if PREFIX + name not in MODEL_TYPES:
        known = ", ".join(one.removeprefix(PREFIX) for one in MODEL_TYPES)
        raise MMJaxError(
            f"--lm {folder}: a {name} model, and no Bunny has such a language model; those are "
            f"{known}"
        )
    if stated not in (None, name):
        raise MMJaxError(
            f"{where}: was trained on a {stated} model, and {folder} is a {name} model; give the "
            "language model it was trained on"
        )
    raw = open_reader(folder)
    # Several have LLaMA's names: only another's can be told.
    if not any(key.startswith(found.marks) for key in raw.keys()):  # noqa: SIM118
        told = told_by(raw.keys())
        raise MMJaxError(
            f"--lm {folder}: config.json says {name} and the tensors are those of "
            f"{told.model_type if told else 'no language model of mmjax'}"
        )
    if differ := differing(hf, {**text, "model_type": None}):
        raise MMJaxError(
            f"{where}: was trained on another language model than {folder}: their config.json say "
            f"{differ}; give the one it was trained on"
        )

    def rename(key: str) -> str | None:
        return None if key.startswith((PROJECTOR, TOWER)) else language.to_hub(key, name)

    return name, text, Renamed(raw, rename)


def _tower(own: Reader, hf: Mapping[str, Any], parts: Parts, where: str) -> Tower:
    """Return the tower: the one inside, or the one given, or the local one that config.json names.

    A tower inside counts: it may have been trained. The peer's loader takes the one it names
    unless config.json says unfreeze_vision_tower, then both are the same.
    """
    about = dict(feature_layer=FEATURE_LAYER, asked=parts.vision_config)
    stated = hf.get("vision_config")
    if _holds(own, TOWER):
        if parts.vision is not None:
            logging.getLogger(__name__).warning(
                f"{where}: holds a vision tower of its own, which may have been trained; "
                f"--vision {parts.vision} is not used"
            )
        return tower_in(own, where, root=TOWER, stated=stated, **about)
    named = hf.get("mm_vision_tower")
    path = parts.vision or (named if named and Path(named).exists() else None)
    if path is None:
        raise MMJaxError(
            f"{where}: holds no vision tower"
            + (f", and {named} is not here" if named else "")
            + "; give the tower's files with --vision FILE_OR_DIR (in Python vision=...)"
        )
    tower = open_tower(path, stated=stated, **about)
    meant = next((kind for mark, kind in _MARKS.items() if mark in str(named).lower()), None)
    if meant not in (None, tower.config["model_type"]):
        logging.getLogger(__name__).warning(
            f"{where}: config.json names the vision tower {named}, and {path} is a "
            f"{tower.config['model_type']}; the projector was hardly trained with that"
        )
    return tower


def _projector(
    own: Reader, hf: Mapping[str, Any], tower: Tower, d_model: int, where: str
) -> dict[str, Any]:
    """Return the connector's kind and input width, as its tensors tell or as is stated.

    d_model: width of the language model.
    """
    keys = [key for key in own.keys() if key.startswith(PROJECTOR)]  # noqa: SIM118
    kind = hf.get("mm_projector_type")
    if kind is None and not keys:
        kind = "mlp2x_gelu"  # fresh, and nothing said: what all published models have
    elif kind is None:
        kind = projector.kind_of(key.removeprefix(PROJECTOR) for key in keys)
    if kind is None:
        raise MMJaxError(
            f"{where}: the kind of its projector cannot be told from its tensors; put the "
            "config.json that it was saved with beside it (mm_projector_type)"
        )
    width = read_vision_config(tower.config).d_model * len(s2_scales(hf) or (1,))
    width = hf.get("mm_hidden_size") or width
    first = next((f"{PROJECTOR}{n}" for n in ("0.weight", "weight") if PROJECTOR + n in keys), None)
    if first and len(own.shape(first)) == 2:
        out, width = own.shape(first)
        if out != d_model:
            raise MMJaxError(
                f"{where}: its projector gives width {out}, and the language model takes "
                f"{d_model}; give the language model the projector was trained with"
            )
    return {"mm_projector_type": kind, "mm_hidden_size": width}


def _end_of_text(folders: Sequence[Path], where: str) -> int:
    """Return the id of the nearest tokenizer's end token."""
    for folder in dict.fromkeys(folders):
        tokenizer = load_tokenizer(folder)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            return tokenizer.eos_token_id
    raise MMJaxError(
        f"{where}: nothing tells the token that ends an answer: config.json says no eos_token_id "
        "and no tokenizer lies beside it; copy the tokenizer's files there, or write the id into "
        "config.json"
    )


def _seen(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a processor has to be told whose files are the language model's alone."""
    config = BunnyConfig.from_hf(hf)
    return {
        **seen_by_tower(hf),
        "image_size": config.image_size,
        "image_tokens": config.image_tokens,
        "image_aspect_ratio": config.image_aspect_ratio,
        "model_max_length": config.max_length,
        "eos_token_id": config.eos_token_id,
    }


def _table(whole: Reader, language_model: Architecture, where: str) -> tuple[int, int]:
    """Read off rows and width of the vocabulary: on merging, the peer cuts it to its tokenizer."""
    theirs = {rule.ours: rule.theirs for rule in language_model.rules}
    embed = theirs["decoder.embed.embedding"]
    if embed not in set(whole.keys()):
        raise MMJaxError(f"{where} lacks {embed}; is its file complete?")
    rows, d_model = whole.shape(embed)
    return rows, d_model
