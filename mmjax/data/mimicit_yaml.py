"""Otter's training YAML as sources: groups of datasets with their paths.

IMAGE_TEXT:                                # see mmjax.data.mimicit.GROUPS
  LADD:
    mimicit_path: LADD_instructions.json
    images_path: LA.parquet
    train_config_path: LADD_train.json     # optional
    num_samples: 20000                     # optional; -1 and 0 take all
    task_description: ["Answer briefly."]  # optional
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmjax.data.mimicit import GROUPS
from mmjax.home import in_home
from mmjax.types import MMJaxError, nearest

PATHS = ("mimicit_path", "images_path", "train_config_path")
_DATA = (".json", ".jsonl", ".ndjson", ".parquet")
KEYS = (*PATHS, "num_samples", "task_description")


def expand_yaml(
    path: str | os.PathLike, with_task_description: bool = True, **options: Any
) -> dict[str, dict[str, Any]]:
    """Return name -> arguments of ``make_source`` for every dataset of a training YAML.

    Paths are relative to the YAML's folder, or else to the working directory. options: further
    arguments of every ``MimicitSource``, such as keep_symbols=False.
    Raises one MMJaxError with every unknown group and key, missing path and wrong value in it.
    """
    path = Path(path)
    if not path.is_file():
        raise MMJaxError(f"{path}: no such file; check the path of this training YAML")
    if path.suffix in _DATA:
        raise MMJaxError(
            f"{path}: is no training YAML, which lists datasets by group, but a file of data; say "
            "what it is by another kind in place of 'mimicit_yaml': 'json', 'parquet', or "
            "'mimicit' with mimicit_path in place of path"
        )
    try:
        groups = in_home(yaml.load(path.read_text("utf-8"), _StrictLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise MMJaxError(f"{path}: cannot be read as YAML: {e}") from e
    if not isinstance(groups, Mapping) or not groups:
        raise MMJaxError(f"{path}: expected groups ({', '.join(GROUPS)}), found {groups!r:.60}")
    problems: list[str] = []
    specs: dict[str, dict[str, Any]] = {}
    for group, datasets in groups.items():
        if group not in GROUPS:
            problems.append(f"unknown group {group!r}{_near(group, GROUPS)}")
        elif datasets is not None and not isinstance(datasets, Mapping):
            problems.append(f"{group}: expected datasets by name, found {datasets!r:.60}")
        else:
            for name, values in (datasets or {}).items():
                name = str(name)  # YAML reads 2023 as a number
                at = f"{group}.{name}"
                if name in specs:
                    problems.append(f"{at}: there is another dataset {name!r}; rename one of them")
                specs[name] = _dataset(path.parent, at, values, problems)
                specs[name]["group"] = group
    if problems:
        raise MMJaxError(f"{path}:\n" + "\n".join(f"  {p}" for p in problems))
    if not specs:
        raise MMJaxError(f"{path}: no group holds a dataset; name at least one to train on")
    for spec in specs.values():
        if not with_task_description:
            spec.pop("task_description", None)
        spec |= {"kind": "mimicit", **options}
    return specs


def _dataset(folder: Path, at: str, values: Any, problems: list[str]) -> dict[str, Any]:
    """Check one dataset's values; problems are appended, with the dataset's name and the fix."""
    if not isinstance(values, Mapping):
        problems.append(f"{at}: expected keys ({', '.join(KEYS)}), found {values!r:.60}")
        return {}
    spec: dict[str, Any] = {}
    for key, value in values.items():
        if key not in KEYS:
            problems.append(f"{at}: unknown key {key!r}{_near(key, KEYS)}")
        elif value is None or value == "":
            continue  # "images_path:" with nothing behind it is as good as left out
        elif key in PATHS:
            found = [p for p in (folder / str(value), Path(str(value))) if os.path.exists(p)]
            spec[key] = str(found[0]) if found else str(value)
            if not found:
                problems.append(
                    f"{at}: {key} {str(value)!r} does not exist{_beside(folder, value)}"
                )
        elif key == "num_samples":
            if not isinstance(value, int) or isinstance(value, bool) or value < -1:
                problems.append(f"{at}: num_samples is {value!r}; a number of entries, -1 for all")
            spec[key] = value
        else:
            lines = [value] if isinstance(value, str) else value
            if not isinstance(lines, list) or not all(isinstance(x, str) for x in lines):
                problems.append(
                    f"{at}: task_description is {value!r:.60}; expected a list of texts"
                )
            spec[key] = lines
    if "mimicit_path" not in spec:
        problems.append(f"{at}: mimicit_path is missing; it names the instructions JSON")
    return spec


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML would keep the last without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # "<<": what is merged may be replaced
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # SafeLoader says where it stands
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _near(name: Any, known: Iterable[str]) -> str:
    return f"{nearest(str(name), known)} (there are {', '.join(known)})"


def _beside(folder: Path, value: Any) -> str:
    """Name the file that the missing one may have meant."""
    parent = (folder / str(value)).parent
    if not parent.is_dir():
        return f"; there is no folder {parent}"
    close = difflib.get_close_matches(Path(str(value)).name, os.listdir(parent), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it is not in {parent}"
