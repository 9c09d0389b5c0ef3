"""Put a Flamingo together: its trained part, its language model and its vision tower.

OpenFlamingo publishes what it trained: the resampler, the gated blocks and an embedding table. The
language model and CLIP come from files of their own. Otter's folders hold everything. A language
model and CLIP alone are what OpenFlamingo's own training begins with.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.models import towers
from mmjax.models.flamingo.config import TOKENIZER_LENGTHS, architecture_of
from mmjax.models.flamingo.processor_config import IDS, is_otter
from mmjax.models.flamingo.sizes import GATED, LANGUAGE, interval, sizes
from mmjax.models.flamingo.vocabulary import check_ids, read_ids, rows_of_tables, tell_rows
from mmjax.models.json_files import read_json
from mmjax.models.language import weights as language
from mmjax.models.language.architecture import Architecture
from mmjax.models.language.architectures import ARCHITECTURES, told_by
from mmjax.models.parts import Assembled, Parts
from mmjax.models.views import Resized
from mmjax.types import MMJaxError
from mmjax.weights.reader import Overlay, Reader, Renamed, open_reader

VISION = "vision_encoder."
TOWERS = {  # by our layout: the tower's own, and what its keys begin with
    "otter": ("hf_clip", f"{VISION}vision_model."),
    "openflamingo": ("open_clip", VISION),
}
_ALIAS = re.compile(r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.")
_FRESH = ("perceiver.*", "cross.*")
_FRESH_INTERVAL = 1  # the default of open_flamingo/train/train.py

log = logging.getLogger(__name__)


def assemble(
    readers: Sequence[Reader], layout: str, hf: Mapping[str, Any], parts: Parts
) -> Assembled:
    """Return the whole model that some files and the other parts make.

    readers: in the names of ``to_hub``, the last counts; without any, resampler and gated blocks
    are fresh. hf: the config.json beside them, or {}. Raises MMJaxError, before any tensor is read,
    when parts are missing or do not fit.
    """
    if not readers and None in (parts.lm, parts.vision):
        raise MMJaxError(
            "a Flamingo that starts from published parts needs a language model and a vision "
            "tower, model.parts={'lm': DIR, 'vision': FILE_OR_DIR}, and only "
            f"{', '.join(parts.given())} is given"
        )
    files = [file for reader in readers for file in reader.files]
    where = ",".join(map(str, files if len(files) < 4 else [files[0].parent]))
    where = where or str(parts.lm or parts.vision)
    own, text, lm = _language_model(parts.lm, hf, where)
    trained = Overlay(*(_canonical(reader, own) for reader in readers))
    tower, layout = _tower(parts, trained, layout, hf, where)
    named = None if tower is None else Renamed(tower.reader, lambda key: TOWERS[layout][1] + key)
    whole = Overlay(*(part for part in (lm, named, trained) if part is not None))
    if readers:
        _check_there(whole, trained, own, where)
        every = interval(trained, own, text, hf, where)
        measured = sizes(trained, own, text, tower.config, hf, where)
    else:  # as stated, and OpenFlamingo's where nothing is
        every, measured = hf.get("cross_attn_every_n_layers", _FRESH_INTERVAL), {}
    folders = [Path(parts.lm)] if parts.lm is not None else []
    otter = is_otter(hf)
    ids, known = read_ids([*(file.parent for file in files), *folders], answer_token=otter)
    rows, resized = rows_of_tables(whole, trained, own, hf, ids, known)
    # Rows of new tokens begin as those of tokens that a run adds, not as zeros.
    short = {} if readers else {key: n for key in resized if (n := whole.shape(key)[0]) < rows}
    resized = {key: n for key, n in resized.items() if key not in short}
    tell_rows(whole, resized)
    out = {k: v for k, v in hf.items() if k != "vocab_size"}
    out |= {"model_type": "flamingo", "cross_attn_every_n_layers": every}
    out |= {"text_config": {**text, "vocab_size": rows}, "vision_config": tower.config, **measured}
    out = {**{k: v for k, v in ids.items() if v is not None}, **out}
    check_ids(out, own, rows, where)
    if otter and out.get("answer_token_id") is None:  # behind <image>, in the peer's order
        behind = out.get("media_token_id", TOKENIZER_LENGTHS[own.model_type] + 1) + 1
        out["answer_token_id"] = behind if behind < rows else None
    adapter = _adapter(whole, hf, parts.tuning_config, where)
    options: dict[str, Any] = {}
    if parts.given():  # the processor's folder may be that of a part
        options = {"image_size": tower.config["image_size"]}
        options |= {"answer_token": True} if otter else {}
        options |= {k: out[k] for k in IDS if out.get(k) is not None}
    if most := (out.get("perceiver_config") or {}).get("max_media"):  # maybe of the tensors alone
        options["max_media"] = most
    return Assembled(
        out,
        Resized(whole, resized) if resized else whole,
        layout,
        adapter=adapter,
        fresh=() if readers else _FRESH,
        rows=min(short.values(), default=None),
        folders=tuple(folders),
        options=options,
    )


def _language_model(
    folder: str | Path | None, hf: Mapping[str, Any], where: str
) -> tuple[Architecture, dict[str, Any], Reader | None]:
    """Return the language model's architecture and config, and its tensors if given apart."""
    if folder is None:
        if not hf.get("text_config"):
            raise MMJaxError(
                f"{where}: a Flamingo without config.json; give the folders of its language model "
                "and its vision tower with --lm DIR --vision FILE_OR_DIR"
            )
        text = dict(hf["text_config"])
        return ARCHITECTURES[architecture_of(text)], text, None
    folder = Path(folder)
    text = read_json(folder, "config.json")
    if text is None or "mmjax" in text:
        raise MMJaxError(
            f"--lm {folder}: give the language model's folder as on Hugging Face, with config.json "
            "and its weights; " + ("this one is converted" if text else "there is no config.json")
        )
    try:
        own = ARCHITECTURES[architecture_of(text)]
    except MMJaxError as error:
        raise MMJaxError(
            f"--lm {folder}: config.json says model_type {text.get('model_type')!r}, no language "
            f"model of a Flamingo; those are {', '.join(TOKENIZER_LENGTHS)}"
        ) from error
    raw = open_reader(folder)
    told = told_by(raw.keys())
    if told is not own:
        raise MMJaxError(
            f"--lm {folder}: config.json says {own.model_type} and the tensors are those of "
            f"{told.model_type if told else 'no language model of mmjax'}"
        )
    layer = re.compile(rf"^{re.escape(own.layers)}\.(\d+)\.")

    def rename(key: str) -> str:
        key = language.to_hub(key, own.model_type)
        return LANGUAGE + layer.sub(rf"{own.layers}.\1.decoder_layer.", key)

    text["model_type"] = own.model_type
    return own, text, Renamed(raw, rename)


def _canonical(reader: Reader, own: Architecture) -> Renamed:
    """Give the gated blocks and the head the names of the table; hide second names of a tensor."""
    there = set(reader.keys())

    def rename(key: str) -> str | None:
        alias = _ALIAS.match(key)
        if alias:
            new = f"{LANGUAGE}{own.layers}.{alias[1]}.{GATED}.{key[alias.end() :]}"
            return None if new in there else new
        if key.startswith(f"{LANGUAGE}old_decoder_blocks."):
            return None
        if key.startswith(LANGUAGE):
            return LANGUAGE + language.to_hub(key.removeprefix(LANGUAGE), own.model_type)
        return key

    return Renamed(reader, rename)


def _tower(
    parts: Parts, trained: Reader, layout: str, hf: Mapping[str, Any], where: str
) -> tuple[towers.Tower | None, str]:
    """Return the tower, given apart or in the model's files, and the layout that has its names."""
    own = [key for key in trained.keys() if key.startswith(VISION)]  # noqa: SIM118
    kind = "otter" if any(".vision_model." in key for key in own) else "openflamingo"
    said = {"stated": hf.get("vision_config") or {}, "asked": parts.vision_config}
    if parts.vision is None:
        if not own:
            return None, layout
        return towers.tower_in(trained, where, root=VISION, **said), kind
    given = towers.open_tower(parts.vision, **said)
    layouts = {tower: ours for ours, (tower, _) in TOWERS.items()}
    if given.layout not in layouts:
        raise MMJaxError(
            f"--vision {parts.vision} is a {given.config['model_type']}, and a Flamingo looks "
            "through CLIP; give CLIP's file or folder"
        )
    found = layouts[given.layout]
    if not own:
        return given, found
    log.warning(
        "the model holds a vision tower of its own, which counts before --vision %s",
        parts.vision,
    )
    if found != kind:
        return towers.tower_in(trained, where, root=VISION, **said), kind
    # Maybe not all of one.
    under = Renamed(given.reader, lambda key: TOWERS[kind][1] + key)
    return towers.tower_in(Overlay(under, trained), where, root=VISION, **said), kind


def _check_there(whole: Reader, trained: Reader, own: Architecture, where: str) -> None:
    """Raise MMJaxError naming every part that is neither in the files nor given."""
    keys = list(whole.keys())
    missing = []
    if not any(key.startswith(f"{LANGUAGE}{own.layers}.0.decoder_layer.") for key in keys):
        missing.append("the language model: give its folder, --lm DIR")
    if not any(key.startswith(VISION) for key in keys):
        missing.append("the vision tower: give CLIP's file or folder, --vision FILE_OR_DIR")
    if "perceiver.latents" not in keys:
        missing.append("the resampler (perceiver.*)")
    gates = [key for key in trained.keys() if key.endswith(f".{GATED}.attn_gate")]  # noqa: SIM118
    if not gates:
        missing.append(f"the gated blocks (*.{GATED}.*)")
    if missing:
        hint = ""
        if not gates:
            hint = (
                ". A file of a later training stage holds what that stage trained: give the "
                "checkpoint it began with in front of it, FIRST.pt,SECOND.pt"
            )
        raise MMJaxError(f"{where} lacks {'; '.join(missing)}{hint}")
    inside = f"{LANGUAGE}{own.layers}."
    other = next((key for key in gates if not key.startswith(inside)), None)
    if other:
        path = other.removeprefix(LANGUAGE).split(f".{GATED}.")[0].rpartition(".")[0]
        fits = [name for name in TOKENIZER_LENGTHS if ARCHITECTURES[name].layers == path]
        raise MMJaxError(
            f"{where} was trained on another language model: its gated blocks stand in {path}, "
            f"which is {' or '.join(fits) or 'unknown'}, and the language model is "
            f"{own.model_type} with {own.layers}; give --lm the model it was trained on"
        )


def _adapter(
    whole: Reader, hf: Mapping[str, Any], file: str | Path | None, where: str
) -> dict[str, Any] | None:
    """Return the settings of the LoRA pairs among the tensors, in PEFT's words; None without."""
    pairs = [key for key in whole.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118
    if not pairs:
        if file is not None:
            raise MMJaxError(f"{where}: holds no LoRA weights; leave --tuning-config away")
        return None
    ranks = {whole.shape(key)[0] for key in pairs}
    said = dict(hf.get("lora_config") or {})
    if file is not None:
        found = read_json(Path(file).parent, Path(file).name)
        if found is None:
            raise MMJaxError(f"--tuning-config {file}: no such file")
        said = {"r": found.get("lora_r"), "lora_alpha": found.get("lora_alpha")}
        said |= {"lora_dropout": found.get("lora_dropout") or 0.0}
    if said.get("lora_alpha") is None:
        raise MMJaxError(
            f"{where}: holds LoRA weights of rank {', '.join(map(str, sorted(ranks)))}, and not "
            "their scale; give the tuning config of its training, --tuning-config FILE, a JSON "
            'object with "lora_r" and "lora_alpha". Published are r 64 with alpha 64 (language '
            "model) and r 128 with alpha 64 (language model and gated blocks)"
        )
    if said.get("r") is not None and {said["r"]} != ranks:
        raise MMJaxError(
            f"{where}: its LoRA weights have rank {', '.join(map(str, sorted(ranks)))}, and "
            f"{file or 'config.json'} says {said['r']}; give the config of its own training"
        )
    return {"peft_type": "LORA", **said, "r": max(ranks)}
