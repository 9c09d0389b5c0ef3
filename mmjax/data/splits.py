"""Splits in a folder of files, as repositories of the Hugging Face hub are laid out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mmjax.types import MMJaxError

_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?=[-_.]|$)", re.IGNORECASE)


def check_one_split(folder: Path, files: Sequence[Path]) -> None:
    """Raise MMJaxError where files of a folder are of several splits, by their or folders' names.

    Trained on together, what a model is tested with would be learnt.
    """
    found: dict[str, Path] = {}
    for file in files:
        inside = file.relative_to(folder)
        names = (_SPLIT.match(part) for part in reversed(inside.parts))
        if split := next((name[1] for name in names if name), None):
            found.setdefault(split.lower(), inside)
    if len(found) > 1:
        raise MMJaxError(
            f"{folder}: holds several splits, {' and '.join(map(str, found.values()))}; name the "
            f"files of one, such as {folder / _pattern(*next(iter(found.items())))}, and let "
            "another be a source of its own"
        )


def _pattern(split: str, file: Path) -> str:
    """Return the pattern of a split's files: ``data/train-*.parquet``, ``train/*.parquet``."""
    own = file.name.lower().startswith(split)
    return str(file.with_name(f"{file.name[: len(split)] if own else ''}*{file.suffix}"))
