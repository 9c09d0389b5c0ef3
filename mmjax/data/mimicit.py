"""MIMIC-IT, the format Otter and OtterHD are trained from: instructions, images by id, a YAML.

Instructions are ``{"meta": ..., "data": {ID: {instruction, answer, image_ids, rel_ins_ids}}}``;
images are parquet or ``{id: base64}``. Every id is checked when a source is opened.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.index_cache import Arrays, as_bytes
from mmjax.data.keyed_json import KeyedJson
from mmjax.data.parquet import ParquetImages, decode_base64
from mmjax.data.skips import listed_as
from mmjax.data.templates import IMAGE_MARK, strip_symbols
from mmjax.types import BadSample, ImageSource, Message, MMJaxError, Record

GROUPS = ("IMAGE_TEXT", "TEXT_ONLY", "VIDEO_TEXT", "IMAGE_TEXT_IN_CONTEXT")


class MimicitSource:
    """The instructions of one MIMIC-IT dataset, with their images.

    mimicit_path: the instructions. images_path: a parquet file, a folder of them, or JSON; not
    read for TEXT_ONLY. train_config_path: ``{id: [related ids]}``, whose entries alone are the
    rows, in its order; without it, populate_rel_ins takes each entry's own ``rel_ins_ids``. The
    related entries stand before the entry itself: as earlier turns about the entry's images, or, in
    IMAGE_TEXT_IN_CONTEXT, as examples that keep their own images. group: see GROUPS; the images of
    VIDEO_TEXT are its frames, at most max_frames of them, evenly spread.

    frames_as: ``images`` makes each image of an entry one of the record's; ``medium`` makes them
    the frames of one, a tuple, as Otter does with videos and with the pairs of SD and CGD (a single
    one stays an image). frames: exactly so many of each entry, evenly spread, repeated where there
    are fewer, which a model of so many frames asks for; None takes what there is, and for a medium
    of VIDEO_TEXT max_frames, as Otter.

    num_samples: 0, -1 or the size take all entries; fewer take a random subset, the same for every
    seed; more are drawn in every epoch of a mixture (``draws``), each entry once before any twice.
    task_description: one of these lines stands before the conversation, a function of (seed,
    entry). keep_symbols: False strips all but letters, digits and ``.,?!()"'``, as Otter did.
    missing: what an image id without image does: ``error`` when the source is opened, or ``skip``
    the entry when it is read.
    """

    def __init__(
        self,
        mimicit_path: str | os.PathLike,
        images_path: str | os.PathLike | None = None,
        train_config_path: str | os.PathLike | None = None,
        *,
        group: str = "IMAGE_TEXT",
        num_samples: int = -1,
        task_description: Sequence[str] | str = (),
        populate_rel_ins: bool = False,
        keep_symbols: bool = True,
        max_frames: int = 32,
        frames_as: str = "images",
        frames: int | None = None,
        missing: str = "error",
        seed: int = 0,
        index_dir: str | os.PathLike | None = None,
    ):
        if group not in GROUPS or missing not in ("error", "skip") or max_frames < 1:
            raise MMJaxError(
                f"MIMIC-IT group {group!r}, missing {missing!r}, max_frames {max_frames}: group is "
                f"one of {', '.join(GROUPS)}, missing is error or skip, max_frames at least 1"
            )
        if frames_as not in ("images", "medium") or (frames is not None and frames < 1):
            raise MMJaxError(
                f"MIMIC-IT frames_as {frames_as!r}, frames {frames}: frames_as is images or "
                "medium, frames at least 1, or None for what there is"
            )
        if not isinstance(num_samples, int) or num_samples < -1:
            raise MMJaxError(
                f"{mimicit_path}: num_samples {num_samples!r} is a number of entries, or -1 for all"
            )
        self.path, self.group, self.seed = Path(mimicit_path), group, seed
        self.keep_symbols, self.max_frames = keep_symbols, max_frames
        self.frames_as, self.frames = frames_as, frames
        if frames is None and frames_as == "medium" and group == "VIDEO_TEXT":
            self.frames = max_frames
        lines = [task_description] if isinstance(task_description, str) else task_description
        if not isinstance(lines, Sequence) or not all(isinstance(x, str) for x in lines):
            raise MMJaxError(
                f"{mimicit_path}: task_description is {task_description!r:.60}; expected texts"
            )
        self.task_description = tuple(lines)
        self._entries = KeyedJson(self.path, "data", _gather_ids, index_dir)
        if not len(self._entries):
            raise MMJaxError(f"{self.path}: 'data' holds no entry; remove this dataset")
        self._images: ParquetImages | JsonImages | None = None
        if images_path is not None and group != "TEXT_ONLY":
            self._images = open_images(images_path, index_dir)
        self._related: KeyedJson | None = None
        self._own_related = populate_rel_ins
        if train_config_path is not None:
            self._related = KeyedJson(train_config_path, None, _gather_lists, index_dir)
        self._check_related()
        if group != "TEXT_ONLY" and missing == "error":
            self._check_images()
        self._entries.arrays.clear()  # needed for the checks alone
        self._chosen = None if self._related is None else self._trained()
        total = len(self._entries) if self._chosen is None else len(self._chosen)
        count = total if num_samples in (-1, 0) else num_samples
        self.draws = count
        if count < total:
            some = np.array(random.Random(0).sample(range(total), count), np.int64)
            self._chosen = some if self._chosen is None else self._chosen[some]

    def __len__(self) -> int:
        return len(self._entries) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> Record:
        return self._get(index)

    def outlines(self, index: int) -> tuple[int, list[Record]]:
        """Return the record alone without its pictures, see ``Source``."""
        return index, [self._get(index, show=False)]

    def _get(self, index: int, show: bool = True) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = index if self._chosen is None else int(self._chosen[index])
        line, name, entry = self._entries[place]
        where = f"{self.path}:{line} (id {name})"
        meta = {"id": name, "source": str(self.path), "line": line}
        with listed_as(meta):
            return self._record(place, name, entry, where, meta, show)

    def _record(
        self, place: int, name: str, entry: Any, where: str, meta: dict[str, Any], show: bool
    ) -> Record:
        related = [self._entry(i, where) for i in self._related_ids(name, entry, where)]
        related.append((where, entry))
        messages: list[Message] = []
        groups: list[list[str]] = []  # the images of each entry that brings its own
        for at, one in related:
            question = self._text(one, "instruction", at)
            if self.group == "IMAGE_TEXT_IN_CONTEXT":
                groups.append(self._chosen_frames(_ids(one, "image_ids", at)))
                question = IMAGE_MARK * self._count(groups[-1]) + question
            messages.append(Message("user", question))
            messages.append(Message("assistant", self._text(one, "answer", at)))
        if self.group in ("IMAGE_TEXT", "VIDEO_TEXT"):
            groups = [self._chosen_frames(_ids(entry, "image_ids", where))]
        if self.task_description:
            rng = np.random.default_rng((self.seed, place))
            line_of_task = self.task_description[int(rng.integers(len(self.task_description)))]
            messages.insert(0, Message("system", line_of_task))
        images = tuple(image for ids in groups for image in self._grouped(ids, where, show))
        image_ids = [i for ids in groups for i in ids]
        meta = {**meta, "answers": [messages[-1].text], "image_ids": image_ids}
        return Record(tuple(messages), images, meta)

    def _chosen_frames(self, ids: list[str]) -> list[str]:
        """Take the frames that are wanted of an entry's images, evenly spread."""
        count = self.frames
        if count is None and self.group == "VIDEO_TEXT":
            count = min(len(ids), self.max_frames)
        if not ids or count is None:
            return ids
        return [ids[i] for i in np.linspace(0, len(ids) - 1, count).astype(int)]

    def _count(self, ids: list[str]) -> int:
        """Return how many images of the record these become."""
        return min(1, len(ids)) if self.frames_as == "medium" else len(ids)

    def _grouped(self, ids: list[str], where: str, show: bool) -> tuple[ImageSource, ...]:
        """Read an entry's images, each for itself or as the frames of one."""
        images = self._read_images(ids, where, show)
        return (images,) if self.frames_as == "medium" and len(images) > 1 else images

    def _entry(self, name: str, where: str) -> tuple[str, Any]:
        place = int(self._entries.ids.find(as_bytes([name]))[0])
        if place < 0:
            raise BadSample("bad_record", f"{where}: related entry {name!r} does not exist")
        line, _, entry = self._entries[place]
        return f"{self.path}:{line} (id {name})", entry

    def _related_ids(self, name: str, entry: Any, where: str) -> list[str]:
        """Return the ids of the entries that stand before this one."""
        if self._related is None:
            return _ids(entry, "rel_ins_ids", where) if self._own_related else []
        place = int(self._related.ids.find(as_bytes([name]))[0])
        if place < 0:
            return []
        line, _, found = self._related[place]
        return _ids({"related": found}, "related", f"{self._related.path}:{line}")

    def _text(self, entry: Any, field: str, where: str) -> str:
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            raise BadSample("bad_record", f"{where}: field {field!r} is missing or is no text")
        # As pre_question and pre_answer of Otter's pipeline/mimicit_utils/mimicit_dataset.py.
        text = entry[field]
        if field == "answer":
            text = text.strip()
            text = text if self.keep_symbols else strip_symbols(text, answer=True)
            return text.replace("\r\n", "\n")
        # In this order: a Windows line end behind a question goes as a whole.
        text = text if self.keep_symbols else strip_symbols(text)
        return text.strip(" ").strip("\n")

    def _read_images(self, names: list[str], where: str, show: bool) -> tuple[bytes, ...]:
        """Read images by their ids; without ``show`` only find them."""
        if not names:
            return ()
        if self._images is None:
            raise BadSample("missing_image", f"{where}: has images, but images_path is not set")
        places = self._images.ids.find(as_bytes(names))
        for name, place in zip(names, places, strict=True):
            if place < 0:
                raise BadSample(
                    "missing_image", f"{where}: image {name!r} is not in {self._images.path}"
                )
        return tuple(self._images[int(place)] if show else b"" for place in places)

    def _check_images(self) -> None:
        """Raise MMJaxError when an image id of any entry has no image."""
        wanted, owner = self._entries.arrays["image_ids"], self._entries.arrays["image_owner"]
        if not len(wanted):
            return
        if self._images is None:
            raise MMJaxError(
                f"{self.path}: {len(np.unique(owner))} of {len(self._entries)} entries have "
                f"image_ids (first {wanted[0].decode()!r}), and images_path is not set; set it, or "
                "put the dataset under TEXT_ONLY"
            )
        absent = np.flatnonzero(self._images.ids.find(wanted) < 0)
        if len(absent):
            name = wanted[absent[0]].decode()
            entry = self._entries[int(owner[absent[0]])][1]
            near = self._images.ids.nearest(name)
            raise MMJaxError(
                f"{self.path}: {len(np.unique(wanted[absent]))} image ids have no image in "
                f"{self._images.path} ({len(self._images)} images), first {name!r} of entry "
                f"{entry!r}{_hint(near)}; add the images, or set missing='skip' to leave those "
                f"{len(np.unique(owner[absent]))} entries out"
            )

    def _trained(self) -> np.ndarray:
        """Return the places of the entries that train_config_path names, in its order."""
        names = self._related.ids.in_file()
        places = self._entries.ids.find(names)
        if not len(names):
            raise MMJaxError(f"{self._related.path}: names no entry to train on; leave it away")
        if (places < 0).any():
            name = names[np.flatnonzero(places < 0)[0]].decode()
            raise MMJaxError(
                f"{self._related.path}: {int((places < 0).sum())} of its {len(names)} entries are "
                f"no entries of {self.path}, first {name!r}"
                f"{_hint(self._entries.ids.nearest(name))}; the two files do not belong together, "
                "or entries were removed"
            )
        return places

    def _check_related(self) -> None:
        """Raise MMJaxError when a related id names no entry."""
        if self._related is not None:
            path, wanted = self._related.path, self._related.arrays.pop("related")
        elif self._own_related:
            path, wanted = self.path, self._entries.arrays["related"]
        else:
            return
        absent = np.flatnonzero(self._entries.ids.find(wanted) < 0)
        if len(absent):
            name = wanted[absent[0]].decode()
            raise MMJaxError(
                f"{path}: {len(np.unique(wanted[absent]))} related ids are no entries of "
                f"{self.path}, first {name!r}{_hint(self._entries.ids.nearest(name))}; the two "
                "files do not belong together, or entries were removed"
            )


class JsonImages:
    """Images by id in one JSON object, ``{id: base64}``."""

    def __init__(self, path: str | os.PathLike, index_dir: str | os.PathLike | None = None):
        self._values = KeyedJson(path, index_dir=index_dir)
        self.path, self.ids = self._values.path, self._values.ids

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, place: int) -> bytes:
        line, name, text = self._values[place]
        where = f"{self.path}:{line} (image {name})"
        if not isinstance(text, str):
            raise BadSample("corrupt_image", f"{where}: is no base64 text")
        return decode_base64(text, where)


def open_images(
    path: str | os.PathLike, index_dir: str | os.PathLike | None = None
) -> ParquetImages | JsonImages:
    """Open an image file by its suffix; a folder is one of parquet files."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".parquet":
        return ParquetImages(path, index_dir)
    if path.suffix == ".json":
        return JsonImages(path, index_dir)
    raise MMJaxError(f"{path}: images are a .parquet file, a folder of them, or a .json file")


def _gather_ids(ids: list[str], entries: list[Any]) -> Arrays:
    """Collect the image and related ids of all entries, for the checks; bad entries have none."""
    images, owner, related = [], [], []
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            continue
        found = _strings(entry.get("image_ids"))
        images += found
        owner += [place] * len(found)
        related += _strings(entry.get("rel_ins_ids"))
    return {
        "image_ids": as_bytes(images),
        "image_owner": np.array(owner, np.int64),
        "related": as_bytes(related),
    }


def _gather_lists(ids: list[str], values: list[Any]) -> Arrays:
    return {"related": as_bytes(name for value in values for name in _strings(value))}


def _strings(value: Any) -> list[str]:
    return [x for x in value if isinstance(x, str)] if isinstance(value, list) else []


def _ids(entry: Any, field: str, where: str) -> list[str]:
    """Read a list of ids; absent and null are none. Raises BadSample for anything else."""
    value = entry.get(field) if isinstance(entry, dict) else None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise BadSample("bad_record", f"{where}: field {field!r} is no list of ids")
    return value


def _hint(near: str | None) -> str:
    return f" (the nearest is {near!r})" if near else ""
