"""Captioned pictures in Karpathy's splits: COCO and Flickr30k."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mmjax.data.benchmarks.files import field, need_pictures, read_json
from mmjax.types import Message, MMJaxError, Record

_WHAT = "Karpathy's dataset_coco.json or dataset_flickr30k.json"
_PICTURES = "the folder that holds COCO's val2014 and train2014, or Flickr30k's pictures"


class KarpathySource:
    """Pictures with about five captions each.

    path: Karpathy's JSON ``{"images": [{filename, filepath, split, sentences: [{raw}]}]}``. images:
        the folder of ``<filepath>/<filename>``, or of the file names alone. split: one of the
        file's; ``train`` has ``restval`` in it, as is usual. question: what a caption is asked for
        with; OpenFlamingo's caption template leaves it out.
    meta: ``answers``, all captions. Raises MMJaxError for missing fields, captions and pictures.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        images: str | os.PathLike,
        split: str = "test",
        question: str = "What does the image describe?",
    ):
        self.path, self._question = os.fspath(path), question
        found = read_json(path, _WHAT)
        listed = found.get("images") if isinstance(found, Mapping) else None
        if not isinstance(listed, list) or not listed:
            raise MMJaxError(f"{path}: holds no list 'images'; give {_WHAT}")
        wanted = ("train", "restval") if split == "train" else (split,)
        known, names, folders = {}, [], {}
        self._rows: list[tuple[str, list[str]]] = []
        for number, image in enumerate(listed):
            where = f"{path}: picture {number}"
            known[field(image, "split", where)] = True
            if image["split"] not in wanted:
                continue
            name = field(image, "filename", where)
            inner = image.get("filepath") or ""
            if inner not in folders:  # asked once: a network disk takes its time
                folders[inner] = Path(images, inner).is_dir()
            names.append((f"{inner}/{name}" if folders[inner] else name, where))
            sentences = field(image, "sentences", where, list)
            captions = [field(one, "raw", where).strip() for one in sentences]
            if not captions:
                raise MMJaxError(f"{where}: {name} has no captions; give {_WHAT}")
            self._rows.append((name, captions))
        if not self._rows:
            raise MMJaxError(f"{path}: has no split {split!r}; it has {', '.join(known)}")
        self._pictures = need_pictures(images, names, _PICTURES)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        name, captions = self._rows[index]
        meta = {"id": name, "source": self.path, "line": index, "answers": list(captions)}
        return Record((Message("user", self._question),), (self._pictures[index],), meta)
