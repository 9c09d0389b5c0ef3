"""Pretraining data in TFDS datasets: interleaved documents, and pictures with captions.

Their records are those of the WebDataset shards of the same data (``mmc4``, ``webdataset``), made
by the same functions. Pictures are handed over as the files they are kept as.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data.interleaved import TEMPLATE, Interleave
from mmjax.data.tfds_files import Part, TfdsFiles, as_text
from mmjax.data.webdataset import pair_record
from mmjax.schema import to_dataclass
from mmjax.types import BadSample, Record

_ID = Part("id", ("text", "integer"))
_DOCUMENT = {
    "id": _ID,
    "text_list": Part("text_list", ("text",), (1,)),
    "image": Part("image_info.image", ("image", "text"), (1,)),
    "image_base64": Part("image_info.image_base64", ("text",), (1,)),
    "matched_text_index": Part("image_info.matched_text_index", ("integer",), (1,)),
    "matched_sim": Part("image_info.matched_sim", ("number",), (1,)),
    "similarity_matrix": Part("similarity_matrix", ("number",), (2, 1)),
}
_PAIR = {
    "id": _ID,
    "image": Part("image", ("image", "text")),
    "caption": Part("caption", ("text",)),
}


class TfdsInterleaved:
    """Documents with pictures among their sentences, in the features that MMC4 has.

    name, split, data_dir: see ``TfdsFiles``. fields: part -> feature where they are called
    otherwise; the parts are ``text_list``, ``image`` (files) or ``image_base64``, and what the
    assignment needs: ``similarity_matrix``, or for ``matched`` ``matched_text_index`` and, if it is
    there, ``matched_sim``; without it every picture stands where it is said to. An empty picture
    is one that could not be downloaded. ``id``, if it is there, names the document. options: see
    ``Interleave``.
    """

    TEMPLATE = TEMPLATE

    def __init__(
        self,
        name: str | os.PathLike,
        split: str,
        fields: Mapping[str, str] | None = None,
        data_dir: str | os.PathLike | None = None,
        **options: Any,
    ):
        self._interleave = to_dataclass(Interleave, options, "source")
        self._files = TfdsFiles(name, split, data_dir, encoded=True)
        assignment = self._interleave.assignment
        place = "matched_text_index" if assignment == "matched" else "similarity_matrix"
        needed = {
            "the sentences": ("text_list",),
            "the pictures": ("image", "image_base64"),
            f"which assignment {assignment!r} needs": (place,),
        }
        self._parts = self._files.parts(_DOCUMENT, needed, fields)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        found, where, meta = _read(self._files, index, self._parts)
        texts = enumerate(found["text_list"])
        info: dict[str, Any] = {
            "text_list": [as_text(text, f"{where}: sentence {i}") for i, text in texts],
            "image_info": _pictures(found, where),
        }
        if "similarity_matrix" in found:
            matrix = _numbers(found["similarity_matrix"])
            wanted = len(info["image_info"]), len(info["text_list"])
            flat = np.shape(matrix) == (wanted[0] * wanted[1],)  # one row behind the other
            info["similarity_matrix"] = matrix.reshape(wanted) if flat else matrix
        return self._interleave.record(info, where, meta)


class TfdsPairs:
    """Pictures and captions; ``fields`` says which features are ``image``, ``caption``, ``id``.

    name, split, data_dir: see ``TfdsFiles``. ``{"caption": "captions.text.0"}`` takes the first of
    a sequence. Records are those of ``LaionSource``.
    """

    def __init__(
        self,
        name: str | os.PathLike,
        split: str,
        fields: Mapping[str, str] | None = None,
        data_dir: str | os.PathLike | None = None,
    ):
        self._files = TfdsFiles(name, split, data_dir, encoded=True)
        needed = {"the picture": ("image",), "its caption": ("caption",)}
        self._parts = self._files.parts(_PAIR, needed, fields)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        found, where, meta = _read(self._files, index, self._parts)
        if not found["image"]:
            raise BadSample("missing_image", f"{where}: {self._parts['image']!r} is empty")
        what = f"{where}: {self._parts['caption']!r}"
        return pair_record(found["image"], found["caption"], what, meta)


def _read(
    files: TfdsFiles, index: int, parts: Mapping[str, str]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return the parts of an element, its place for messages, and the record's meta."""
    element, where = files[index], files.where(index)
    found = {part: files.take(element, path, where) for part, path in parts.items()}
    name = as_text(found.get("id", f"{files.split}/{index}"), where)
    meta = {"id": name, "source": files.name, "line": index}
    return found, f"{where} (id {name})", meta


def _pictures(found: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return MMC4's ``image_info`` of an element."""
    part = "image" if "image" in found else "image_base64"
    listed: list[dict[str, Any]] = []
    for i, held in enumerate(found[part]):
        if part == "image_base64":
            held = as_text(held, f"{where}: picture {i}")
        listed.append({part: held} if held else {})
    columns: dict[str, Sequence[Any]] = {}
    if "matched_text_index" in found:
        columns["matched_text_index"] = np.asarray(found["matched_text_index"]).tolist()
        # No number: what a file does not doubt is alike enough, whatever the threshold.
        sims = found.get("matched_sim")
        columns["matched_sim"] = [math.inf] * len(listed) if sims is None else list(_numbers(sims))
    for name, values in columns.items():
        if len(values) != len(listed):
            raise BadSample(
                "bad_record", f"{where}: {len(values)} {name!r} for {len(listed)} picture(s)"
            )
        for one, value in zip(listed, values, strict=True):
            one[name] = value
    return listed


def _numbers(values: Any) -> Any:
    """Return numbers as float32 where nothing is lost, else as float64.

    TFDS keeps numbers as float32 even where it hands out float64, and they are compared as what
    they are kept as. Rows of different lengths are left for ``Interleave`` to refuse.
    """
    try:
        wide = np.array([np.asarray(row, np.float64) for row in values], np.float64)
    except ValueError:
        return values
    narrow = wide.astype(np.float32)
    return narrow if np.array_equal(narrow, wide) else wide
