"""Sources: sequences of records with random access, picklable so that data workers can open them.

A source has ``__len__`` and ``__getitem__(i) -> Record``. Opening a source raises MMJaxError when
the whole of it is unusable; a single bad record raises BadSample when it is read, naming the file,
the line, the field and the value.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mmjax.data.conversations import bad_record, read_turns, shown
from mmjax.data.jsonl import IndexedJson
from mmjax.data.templates import IMAGE_MARK
from mmjax.types import BadSample, ImageSource, Message, MMJaxError, Record


@runtime_checkable
class Source(Protocol):
    """What the pipeline needs of a source.

    One whose pictures cost to read may have ``outlines(index) -> (first, records)``: the records
    from ``first`` on that it reads together with this one, a BadSample for one that is none. They
    have as many images as the records themselves, but these show nothing.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


_VIDEOS = ("video", "videos")
NOT_READ = ("image_path", "image_paths", "image_file", "image_url", "img", "img_path", *_VIDEOS)
"""Names that people give to pictures and videos, and that are not read."""
_IMAGE_PATH = "<img_path>"
_KEPT = ("answers", "choices", "answer", "group", "split")  # fields a task may score with


class JsonSource:
    """Records of a ``.json`` array or a ``.jsonl`` file; the forms are in docs/data_formats.md.

    path: the file. image_root: the folder that image names are relative to (default: the file's
    own). index_dir: where the byte-offset index is cached (default: beside the file). draws: how
    often an epoch of a mixture draws from it (default: its length), each record once before any
    twice.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image_root: str | os.PathLike | None = None,
        index_dir: str | os.PathLike | None = None,
        draws: int | None = None,
    ):
        self.path = Path(path)
        self.image_root = image_folder(image_root, self.path.parent)
        self._file = IndexedJson(path, index_dir)
        if draws is not None and draws < 1:
            raise MMJaxError(f"{path}: draws {draws} is a number of records of an epoch, from 1 up")
        self.draws = len(self._file) if draws is None else draws

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> Record:
        file, value = self._file, {}
        path, line, name = str(self.path), file.line(index), file.name(index)
        try:
            _, value = file[index]
            place = dict(name=name, where=file.where(index))
            return parse_record(value, path, line, self.image_root, **place)
        except BadSample as error:  # it is listed as the record that it is
            own = value.get("id")
            own = name if own is None else own
            error.meta = {"id": own, "source": path, "line": line}
            raise


def image_folder(image_root: str | os.PathLike | None, beside: Path) -> Path:
    """Return the folder that image names are relative to, ``beside`` where none is given.

    Raises MMJaxError for one that is not there: every record would be skipped for it.
    """
    if image_root is None:
        return beside
    folder = Path(image_root)
    if not folder.is_dir():
        raise MMJaxError(
            f"image_root {folder}: no such folder; give the one that image names are relative to, "
            f"or leave it away where that is {beside}"
        )
    return folder


def parse_record(
    value: Mapping[str, Any],
    path: str,
    line: int,
    image_root: Path,
    encoded: tuple[ImageSource, ...] | None = None,
    name: str | None = None,
    where: str | None = None,
) -> Record:
    """Read one JSON object of any accepted form; raises BadSample naming file, line and field.

    encoded: the images where they are at hand, instead of the names in ``image`` or ``images``.
    name: the id of a record without one; None for its line. where: names the place in a message;
    None for path and line.
    """
    where = where or f"{path}:{line}"
    forms = [f for f in ("conversations", "messages", "question", "output") if f in value]
    if len(forms) != 1:
        found = ", ".join(map(repr, value)) or "no field at all"
        reason = f"has both {' and '.join(forms)}" if forms else "misses 'conversations'"
        near = difflib.get_close_matches("conversations", value, n=1)
        hint = f"; is {near[0]!r} a slip of the pen?" if near and not forms else ""
        raise bad_record(
            where,
            f"the record {reason} (found {found}){hint}; give exactly one of 'conversations', "
            "'messages', 'question', or 'input' with 'output'",
        )
    images = encoded if encoded is not None else _images(value, where, image_root)
    if forms[0] == "output":
        messages, named = _instruct(value, where, image_root, marks=bool(images))
        images = named or images
    elif forms[0] == "question":
        messages = _question(value, where)
    else:
        messages, named = read_turns(value[forms[0]], forms[0], where)
        if named and images:
            raise bad_record(
                where, f"pictures stand in {forms[0]!r} and in a field of their own; keep one"
            )
        images = tuple(str(image_root / name) for name in named) or images
    marks = sum(m.text.count(IMAGE_MARK) for m in messages)
    texts = "input" if forms[0] == "output" else forms[0]
    if marks not in (0, len(images)):
        raise BadSample(
            "image_mismatch",
            f"{where}: {marks} {IMAGE_MARK} mark(s) in {texts!r} for {len(images)} image(s) in "
            "'image'; write one mark for each image, or none to put them all in front",
        )
    own = value.get("id")
    meta = {"id": (name or str(line)) if own is None else own, "source": path, "line": line}
    meta |= {k: value[k] for k in _KEPT if k in value}
    if messages[-1].role == "assistant":
        meta.setdefault("answers", [messages[-1].text])
    return Record(messages, images, meta)


def _question(value: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """Read the short form: 'question', and 'answer' or the first of 'answers' where known."""
    if not isinstance(value["question"], str):
        raise bad_record(where, f"field 'question' is {shown(value['question'])}, not a string")
    messages = [Message("user", value["question"])]
    answer, answers = value.get("answer"), value.get("answers")
    if answers is None:
        if not isinstance(answer, str | None):
            raise bad_record(where, f"field 'answer' is {shown(answer)}, not a string")
        answers = [] if answer is None else [answer]
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise bad_record(where, f"field 'answers' is {shown(answers)}; expected a list of strings")
    if answers:
        messages.append(Message("assistant", answers[0]))
    return tuple(messages)


def _instruct(
    value: Mapping[str, Any], where: str, root: Path, marks: bool
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Read the form of Open Flamingo's instruction data: its images are named inside the text.

    marks: the record's images are in a field of their own, so that the text may mark their places.
    """
    texts = {name: value.get(name, "") for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise bad_record(where, f"field {name!r} is {shown(text)}, not a string")
    prompt = texts["instruction"] + texts["input"]
    pieces = prompt.split(_IMAGE_PATH)
    if len(pieces) % 2 == 0:
        raise bad_record(
            where,
            f"field 'input' holds {len(pieces) - 1} {_IMAGE_PATH} marks; a file name stands "
            "between two of them",
        )
    names = [name.strip() for name in pieces[1::2]]
    if "" in names or (IMAGE_MARK in prompt and (names or not marks)):
        raise bad_record(where, f"field 'input' holds an empty file name or a bare {IMAGE_MARK}")
    # Every second piece is a file name; the mark stands where it was.
    text = "".join(piece if i % 2 == 0 else IMAGE_MARK for i, piece in enumerate(pieces))
    messages = (Message("user", text), Message("assistant", texts["output"]))
    return messages, tuple(str(root / name) for name in names)


def _images(value: Mapping[str, Any], where: str, root: Path) -> tuple[str, ...]:
    """Read 'image' or 'images': absent, null, one name, or a list of names."""
    if "image" in value and "images" in value:
        raise bad_record(where, "both 'image' and 'images' are given; keep one")
    field = "images" if "images" in value else "image"
    names = value.get(field)
    unread = _VIDEOS if field in value else NOT_READ  # beside an image a link may be the same one
    if other := next(filter(value.get, unread), None):
        without = f"take {other!r} out" if field in value else "write 'image': null"
        raise bad_record(  # or it would be trained on blindly
            where,
            f"field {other!r} is {shown(value[other])}, and pictures are read from 'image' or "
            "'images' alone: call it so (of a video, a list of the files of its frames), or, to "
            f"train without it, {without}",
        )
    if names is None:
        return ()
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str) or not name:
            raise bad_record(where, f"field {field!r} holds {shown(name)}; expected file names")
    return tuple(str(root / name) for name in names)
