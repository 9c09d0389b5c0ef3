"""The JSON files of a model folder, read with errors that name the file."""

from __future__ import annotations

import json
import os
from typing import Any

from mmjax.types import MMJaxError


def read_json(folder: str | os.PathLike, file: str) -> dict[str, Any] | None:
    """Read one JSON object; None when the file is not there.

    Raises MMJaxError naming the file when it is not JSON.
    """
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8-sig") as stream:  # some editors write a byte order mark
            data = json.load(stream)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MMJaxError(f"{path}: not a JSON object ({error}); download it again") from error
    if not isinstance(data, dict):
        raise MMJaxError(
            f"{path}: not a JSON object but a {type(data).__name__}; download it again"
        )
    return data
