"""The files that travel with a model beside its weights: tokenizer, processor, templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mmjax.models.json_files import read_json

_GENERATION = "generation_config.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "adept_vocab.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    _GENERATION,
    "chat_template.json",
    "chat_template.jinja",
)


def stated_ends(folders: Sequence[Path], vocab_size: int) -> tuple[int, ...]:
    """Return the tokens that end an answer by the nearest generation_config.json or config.json.

    As transformers' ``generate`` does, which reads the first alone where a folder has it: there an
    instruction-tuned model lists the end of a turn beside the end of a text. Ids outside the
    vocabulary, which no model can say, are left out.
    Raises MMJaxError for a file that is damaged.
    """
    for folder in folders:
        for name in (_GENERATION, "config.json"):
            stated = (read_json(folder, name) or {}).get("eos_token_id")
            if stated is not None:
                ends = stated if isinstance(stated, list) else [stated]
                return tuple(i for i in ends if i < vocab_size)
    return ()


def write_ends(ends: Sequence[int], folder: Path) -> None:
    """Write a generation_config.json that states the tokens that end an answer."""
    text = json.dumps({"eos_token_id": list(ends)}, indent=2)
    (folder / _GENERATION).write_text(text + "\n", "utf-8")


def copy_companions(folders: Sequence[Path], destination: Path) -> list[str]:
    """Copy tokenizer and processor files, each from the first folder that has it."""
    copied = []
    for name in COMPANIONS:
        source = next((Path(f) / name for f in folders if (Path(f) / name).is_file()), None)
        if source is not None:
            shutil.copyfile(source, destination / name)
            copied.append(name)
    return copied
