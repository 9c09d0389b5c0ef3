"""ImageNet (Deng et al. 2009; ILSVRC 2012): which of 1,000 classes is in a picture?"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.benchmarks.files import need_file, need_path, need_pictures, read_json
from mmjax.types import Message, MMJaxError, Record

OUTPUT = "Output:"
"""How OpenFlamingo asks for a class, behind the picture."""

_PICTURES = "the folder of a split, with a folder of pictures for each class, such as n01440764"
_NAMES = "LOC_synset_mapping.txt, imagenet_class_index.json, or a JSON list of names"
_LABELS = "LOC_val_solution.csv"
_ENDINGS = (".jpeg", ".jpg", ".png")


class ImageNetSource:
    """Pictures of ImageNet's form, each a question with the names of all classes as options.

    images: the folder of a split, which has one for each class, called by its WordNet id; in the
        order of those and of the files, as torchvision's ``ImageFolder``. With labels the folder
        has the pictures themselves.
    names: what the classes are called: ``LOC_synset_mapping.txt`` (its first name of each), Keras'
        ``imagenet_class_index.json``, a JSON object id -> name, or a JSON list in the order of the
        ids, such as the names of OpenAI's CLIP, by which OpenFlamingo's numbers are made. Classes
        of one name are one option, and that name is right for each of them.
    labels: ``LOC_val_solution.csv``, the classes of the pictures. question: what is asked.
    meta: ``answers``: the name; ``choices``: all names; ``class``: the WordNet id. Raises
    MMJaxError for files that are missing or do not fit each other.
    """

    def __init__(
        self,
        images: str | os.PathLike,
        names: str | os.PathLike,
        labels: str | os.PathLike | None = None,
        question: str = OUTPUT,
    ):
        self.path = os.fspath(images)
        self._question = question
        rows = _by_folder(images) if labels is None else _by_table(images, labels)
        self._pictures, self._classes = zip(*rows, strict=True)
        self._names = _read_names(names, sorted(set(self._classes)))
        self._choices = tuple(dict.fromkeys(self._names.values()))

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Record:
        picture, label = self._pictures[index], self._classes[index]
        meta = {"id": Path(os.path.relpath(picture, self.path)).as_posix(), "source": self.path}
        meta |= {"class": label, "answers": [self._names[label]], "choices": self._choices}
        return Record((Message("user", self._question),), (picture,), meta)


def _by_folder(images: str | os.PathLike) -> list[tuple[str, str]]:
    """Return (picture, class) of a folder of classes."""
    root = need_path(images, _PICTURES)
    classes = sorted(x.name for x in root.iterdir() if x.is_dir() and not x.name.startswith("."))
    found = []
    for label in classes:
        inside = sorted(os.listdir(root / label))
        own = [os.path.join(root, label, x) for x in inside if x.lower().endswith(_ENDINGS)]
        if not own:
            raise MMJaxError(f"{root / label}: no pictures in this class; give {_PICTURES}")
        found += [(picture, label) for picture in own]
    if not found:
        raise MMJaxError(
            f"{root}: holds no folders of classes; give {_PICTURES}, or with labels={_LABELS} the "
            "folder that has the pictures themselves"
        )
    return found


def _by_table(images: str | os.PathLike, labels: str | os.PathLike) -> list[tuple[str, str]]:
    """Return (picture, class) of ImageNet's table of what is in each picture."""
    path = need_file(labels, _LABELS)
    found = []
    with open(path, newline="", encoding="utf-8-sig") as f:
        for row in (lines := csv.DictReader(f)):
            where = f"{path}:{lines.line_num}"
            key, boxes = row.get("ImageId"), (row.get("PredictionString") or "").split()
            if not key or not boxes:
                raise MMJaxError(f"{where}: lacks ImageId or PredictionString; give {_LABELS}")
            # A class stands before each of its boxes, and a picture has one class.
            found.append((f"{key}.JPEG", where, boxes[0]))
    if not found:
        raise MMJaxError(f"{path}: names no pictures; give {_LABELS}")
    paths = need_pictures(images, [pair[:2] for pair in found], "the folder of its pictures")
    return [(picture, label) for picture, (_, _, label) in zip(paths, found, strict=True)]


def _read_names(path: str | os.PathLike, classes: Sequence[str]) -> Mapping[str, str]:
    """Return id -> name, all of the file; raises MMJaxError where one of the classes has none."""
    names = _of_json(path, classes) if Path(path).suffix == ".json" else _of_lines(path)
    lost = [label for label in classes if label not in names]
    if lost:
        raise MMJaxError(
            f"{path}: has no name for the class {lost[0]!r} ({len(lost):,} of {len(classes):,} "
            f"have none); give {_NAMES}, and as images {_PICTURES}"
        )
    if len(set(names.values())) < 2:
        raise MMJaxError(f"{path}: has one name alone, and there is nothing to choose; give more")
    return names


def _of_lines(path: str | os.PathLike) -> dict[str, str]:
    """Read lines of ``n01440764 tench, Tinca tinca``."""
    names = {}
    try:
        lines = need_file(path, _NAMES).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise MMJaxError(f"{path}: not UTF-8 at byte {e.start}; give {_NAMES}") from e
    for number, line in enumerate(lines, 1):
        if line.strip():
            label, *rest = line.split(maxsplit=1)
            names[label] = _name(rest[0].split(",")[0] if rest else "", f"{path}:{number}")
    return names


def _of_json(path: str | os.PathLike, classes: Sequence[str]) -> dict[str, str]:
    """Read a list of names, an object id -> name, or one number -> [id, name]."""
    given = read_json(path, _NAMES)
    if isinstance(given, list):
        if len(given) != len(classes):
            raise MMJaxError(
                f"{path}: is a list of {len(given):,} names, and there are pictures of "
                f"{len(classes):,} classes: which is which cannot be told; give names with their "
                "ids, such as LOC_synset_mapping.txt"
            )
        given = dict(zip(classes, given, strict=True))
    if not isinstance(given, dict):
        raise MMJaxError(f"{path}: is a {type(given).__name__}; give {_NAMES}")
    pairs = [
        value if isinstance(value, list) and len(value) == 2 else (key, value)
        for key, value in given.items()
    ]
    return {str(label): _name(name, f"{path}: class {label}") for label, name in pairs}


def _name(value: Any, where: str) -> str:
    """Return a name as it is said: Keras writes its spaces as underscores."""
    name = value.replace("_", " ").strip() if isinstance(value, str) else ""
    if not name:
        raise MMJaxError(f"{where}: the name is {value!r}; give a text")
    return name
