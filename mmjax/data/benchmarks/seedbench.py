"""SEED-Bench (Li et al. 2023, arXiv 2307.16125) and SEED-Bench-2 (arXiv 2311.17092)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from mmjax.data.benchmarks.files import field, need_pictures, read_json, unique
from mmjax.data.turns import IMAGE_MARK
from mmjax.types import Message, MMJaxError, Record

VIDEO = (
    *("Action Recognition", "Action Prediction", "Procedure Understanding"),
    "Global Video Understanding",
)
"""Question types about videos, of which their frames are shown."""

LETTERS = "ABCD"
_LEVELS = {"L1": ("L1",), "L2": ("L1", "L2")}
_WHAT = "SEED-Bench.json, or SEED-Bench_v2_level1_2_3.json"
_PICTURES = "the folder of SEED-Bench-image, pictures of CC3M without an ending"
_PICTURES_V2 = "the folder of SEED-Bench-2-image, with task10 to task27"
_FRAMES = (
    "the folder of one frame a video, <question_type_id>_<question_id>.png, that the "
    "extract_video_frames.py of LLaVA or Bunny writes"
)


class SeedBenchSource:
    """SEED-Bench's questions with options A to D.

    path: JSON ``{"questions": [{question_id, question_type_id, question, choice_a, ..., answer,
        data_id, data_type}], "question_type": {name: id}}``. images: the folder of the pictures.
    frames: a folder of one frame of each video; without it, questions about videos are left away.
    images_v2: the folder of SEED-Bench-2's own pictures, which it needs. level: of SEED-Bench-2;
        L1 is about pictures and videos, L2 has text between pictures too. L3, whose options are
        pictures to be made, cannot be asked with letters. layout: whether the options stand behind
        a question, or the ``question`` stands alone, for tasks that rank them.
    meta: ``answers``, ``choices``, ``group`` (the question type). Raises MMJaxError for missing
        fields and pictures, an answer that is no option, and ids given twice.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        images: str | os.PathLike,
        frames: str | os.PathLike | None = None,
        images_v2: str | os.PathLike | None = None,
        level: Literal["L1", "L2"] = "L2",
        layout: Literal["options", "question"] = "options",
    ):
        if layout not in ("options", "question"):
            raise MMJaxError(f"{path}: layout is {layout!r}; it is 'options' or 'question'")
        if level not in _LEVELS:
            raise MMJaxError(f"{path}: level is {level!r}; it is 'L1' or 'L2'")
        self.path = os.fspath(path)
        found = read_json(path, _WHAT)
        listed = found.get("questions") if isinstance(found, Mapping) else None
        types = found.get("question_type") if isinstance(found, Mapping) else None
        if not isinstance(listed, list) or not listed or not isinstance(types, Mapping):
            raise MMJaxError(
                f"{path}: holds no list 'questions' beside an object 'question_type'; give {_WHAT}"
            )
        kinds = {number: name for name, number in types.items()}
        self._rows: list[dict[str, Any]] = []
        wanted: dict[str, list[tuple[str, str]]] = {"images": [], "frames": [], "images_v2": []}
        for number, question in enumerate(listed):
            where = f"{path}: question {number}"
            kind = field(question, "data_type", where)
            if "level" in question:
                if question["level"] not in _LEVELS[level]:
                    continue
                own = field(question, "data_source", where) != "cc3m"
                folder = "images_v2" if own else "images"
                names = question["data_id"]
                names = names if isinstance(names, list) else [names]
            elif kind == "video":
                if frames is None:
                    continue
                folder = "frames"
                names = [f"{question['question_type_id']}_{question['question_id']}.png"]
            else:
                folder, names = "images", [field(question, "data_id", where)]
            places = range(len(wanted[folder]), len(wanted[folder]) + len(names))
            wanted[folder] += [(str(name), where) for name in names]
            row = _read(question, kinds, where, alone=layout == "question")
            self._rows.append(row | {"folder": folder, "at": places})
        if not self._rows:
            raise MMJaxError(f"{path}: holds no questions about pictures; give {_WHAT}")
        unique([(row["id"], row["where"]) for row in self._rows], "question")
        roots = {
            "images": (images, _PICTURES),
            "frames": (frames, _FRAMES),
            "images_v2": (images_v2, _PICTURES_V2),
        }
        self._pictures: dict[str, list[str]] = {}
        for name, (root, what) in roots.items():
            if wanted[name] and root is None:
                raise MMJaxError(f"{wanted[name][0][1]}: give {name}, {what}")
            self._pictures[name] = need_pictures(root, wanted[name], what) if wanted[name] else []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        letter, choices = row["answer"], row["choices"]
        meta = {"id": row["id"], "source": self.path, "line": row["number"]}
        meta |= {"answers": [f"({letter})" if letter in choices else letter]}
        meta |= {"choices": list(choices), "group": row["group"]}
        images = tuple(self._pictures[row["folder"]][i] for i in row["at"])
        return Record((Message("user", row["text"]),), images, meta)


def _read(
    question: Mapping[str, Any], kinds: Mapping[Any, str], where: str, *, alone: bool
) -> dict[str, Any]:
    """Return id, text with its options, choices, answer and question type of a question."""
    text = field(question, "question", where)
    for mark in ("<img>", "[img]"):  # its description has the one, its code the other
        text = text.replace(mark, IMAGE_MARK)
    given = (question.get(f"choice_{letter.lower()}") for letter in LETTERS)
    choices = [str(one) for one in given if one is not None]
    answer = field(question, "answer", where)
    if answer not in list(LETTERS[: len(choices)]):
        raise MMJaxError(
            f"{where}: the answer is {answer!r}, none of the options "
            f"{', '.join(LETTERS[: len(choices)])}; give {_WHAT}"
        )
    kind = field(question, "question_type_id", where, int)
    if kind not in kinds:
        raise MMJaxError(f"{where}: question_type_id is {kind}, and 'question_type' has no such id")
    lines = (f"{a}. {c}" for a, c in zip(LETTERS, choices, strict=False))
    return {
        "id": str(field(question, "question_id", where, (str, int))),
        "where": where,
        "number": int(where.rpartition(" ")[2]),
        "text": text if alone else "\n".join([text, *lines]),
        "choices": choices,
        "answer": answer,
        "group": kinds[kind],
    }
