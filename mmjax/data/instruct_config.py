"""Instruct-Flamingo's dataset config as sources: a JSON list of files, each with its share.

[{"dataset_name": "vqa", "json_path": "vqa.json", "img_dir": "images", "ratio": 2.0}, ...]
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from mmjax.data.jsonl import IndexedJson
from mmjax.data.mixture import apportion
from mmjax.home import in_home
from mmjax.types import BadSample, MMJaxError, nearest

KEYS = ("dataset_name", "json_path", "img_dir", "ratio")
SAMPLING = ("ratio", "sqrt")


def expand_config(
    path: str | os.PathLike,
    num_samples: int = -1,
    sampling: str = "ratio",
    img_dir: str | os.PathLike | None = None,
    index_dir: str | os.PathLike | None = None,
) -> dict[str, dict[str, Any]]:
    """Return name -> arguments of ``make_source`` for every dataset of a config.

    num_samples: draws of all datasets together in an epoch, -1 for every record once. sampling:
    they are shared out by each dataset's ``ratio``, or by the ``sqrt`` of its size. Paths are
    relative to the config's folder, or else to the working directory; images to ``img_dir``, that
    of the dataset before the one given here, or else to the folder of its file. A list of samples
    instead of a config, in any form that ``JsonSource`` reads, is one dataset. Raises one
    MMJaxError with everything that is wrong.
    """
    path = Path(path)
    number = isinstance(num_samples, int) and (num_samples > 0 or num_samples == -1)
    if sampling not in SAMPLING or not number:
        raise MMJaxError(
            f"{path}: sampling {sampling!r}, num_samples {num_samples!r}: sampling is one of "
            f"{', '.join(SAMPLING)}, num_samples a whole number from 1 up, or -1 for every record "
            "once"
        )
    rows = IndexedJson(path, index_dir)
    try:
        first = rows[0][1] if len(rows) else {}
        if first and not {"dataset_name", "json_path"} & first.keys():
            whole = {"dataset_name": path.stem, "json_path": path.name, "ratio": 1.0}
            datasets = [(1, whole)]
        else:
            datasets = in_home([rows[i] for i in range(len(rows))])
    except BadSample as error:
        raise MMJaxError(str(error)) from error
    problems: list[str] = []
    specs: dict[str, dict[str, Any]] = {}
    shares: list[float] = []
    for line, values in datasets:
        name = values.get("dataset_name")
        at = f"{path}:{line} ({name})"
        if not isinstance(name, str) or not name or name in specs:
            problems.append(f"{at}: dataset_name {name!r} is a text that no other dataset has")
            continue
        specs[name] = _dataset(path.parent, at, values, img_dir, problems)
        if num_samples > 0 and sampling == "ratio":
            ratio = values.get("ratio")
            if not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
                problems.append(f"{at}: ratio is {ratio!r}; a share above 0, or drop the dataset")
            shares.append(ratio)
    if not datasets:
        problems.append(f"{path}: no dataset; name at least one to train on")
    if problems:
        raise MMJaxError("\n  ".join(["a dataset config is wrong:", *problems]))
    if index_dir is not None:
        specs = {name: {**spec, "index_dir": index_dir} for name, spec in specs.items()}
    if num_samples > 0:
        if sampling == "sqrt":
            shares = [math.sqrt(len(IndexedJson(s["path"], index_dir))) for s in specs.values()]
        for spec, draws in zip(specs.values(), apportion(shares, num_samples), strict=True):
            spec["draws"] = draws
    return specs


def _dataset(
    folder: Path, at: str, values: dict[str, Any], img_dir: Any, problems: list[str]
) -> dict[str, Any]:
    """Check one dataset's paths and keys; problems are appended."""
    for key in values:
        if key not in KEYS:
            hint = nearest(key, KEYS) or f" (there are {', '.join(KEYS)})"
            problems.append(f"{at}: unknown key {key!r}{hint}")
    spec: dict[str, Any] = {"kind": "json"}
    wanted = {"path": values.get("json_path"), "image_root": values.get("img_dir") or img_dir}
    for name, value in wanted.items():
        if name == "image_root" and not value:
            continue
        field, names = "img_dir", "the folder of the images"
        if name == "path":
            field, names = "json_path", "the samples"
        if not isinstance(value, str | os.PathLike) or not value:
            problems.append(f"{at}: {field} is {value!r}; it names {names}")
            continue
        found = next((p for p in (folder / value, Path(value)) if os.path.exists(p)), None)
        if found is None:
            problems.append(f"{at}: {field} {str(value)!r} does not exist, nor in {folder}")
        spec[name] = str(found or value)
    return spec
