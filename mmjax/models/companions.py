"""The files that travel with a model beside its weights: tokenizer, processor, templates."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

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
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def copy_companions(folders: Sequence[Path], destination: Path) -> list[str]:
    """Copy tokenizer and processor files, each from the first folder that has it."""
    copied = []
    for name in COMPANIONS:
        source = next((Path(f) / name for f in folders if (Path(f) / name).is_file()), None)
        if source is not None:
            shutil.copyfile(source, destination / name)
            copied.append(name)
    return copied
