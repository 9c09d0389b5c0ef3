"""MMMU (Yue et al. 2023, arXiv 2311.16502): college questions, each about one to seven pictures."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any, Literal, get_args

from mmjax.data.benchmarks.asking import ONE_LETTER, ONE_PHRASE
from mmjax.data.benchmarks.files import field, need_path, read_json, unique
from mmjax.data.benchmarks.tables import Table, text_of
from mmjax.data.turns import IMAGE_MARK
from mmjax.types import Message, MMJaxError, Record

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
SUBJECTS = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
"""Subject -> its discipline."""

Layout = Literal["interleaved", "front", "bunny"]
_LAYOUTS = get_args(Layout)
_PICTURES = tuple(f"image_{i}" for i in range(1, 8))
_MARK = re.compile(r"<image (\d+)>")
_HIDDEN = ("", "?")  # in the place of a test split's answers
_WHAT = "MMMU's parquet files, <subject>/validation-*.parquet"
_ANSWERS = "MMMU's answer_dict_val.json"


class MmmuSource:
    """MMMU's questions, with several options or open.

    path: the hub's parquet files, a folder with one for each subject (MMMU/MMMU) or one of all
        (lmms-lab/MMMU), or a file: ``id``, ``question``, ``options`` (a Python list as text),
        ``answer``, ``question_type`` and ``image_1`` to ``image_7``. split: which files of a
        folder are read, ``<split>-*.parquet``.
    layout: where pictures stand. ``interleaved``: at the first ``<image 1>`` of question or options
        that names them, in front where none does. ``front``: all before the question, whose text
        keeps the marks. ``bunny``: as Bunny's evaluator does, ``image_1`` alone, before the text.
    instruction: end each question with the publisher's sentence for its kind.
    annotations: ``answer_dict_val.json``, whose answers take the place of the files' own.
    meta: ``answers``, ``choices`` of a question with options, ``group`` (the subject). A test
        split, whose answers are ``?``, has ``unscored``. Raises MMJaxError for missing columns, an
        unknown subject, options that are no list, and an answer that is no option.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "validation",
        layout: Layout = "interleaved",
        instruction: bool = True,
        annotations: str | os.PathLike | None = None,
    ):
        if layout not in _LAYOUTS:
            raise MMJaxError(f"{path}: layout is {layout!r}; it is one of {', '.join(_LAYOUTS)}")
        self._layout, self._instruction = layout, instruction
        given = None if annotations is None else _read_annotations(annotations)
        columns = ("id", "question", "options", "answer", "question_type")
        self._rows: list[tuple[Table, int, str, dict[str, Any]]] = []
        self._last: Table | None = None
        self.tables: list[Table] = []
        for file in _files(path, split):
            table = Table(file, _PICTURES, columns)
            self.tables.append(table)
            for i, (where, row) in enumerate(table.rows):
                if given is not None:
                    row = row | {"answer": _given(row["id"], given, annotations, where)}
                self._rows.append((table, i, os.fspath(file), _question(row, where)))
        unique([(r["id"], f"{file}:{i}") for _, i, file, r in self._rows], "question")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        table, row, file, one = self._rows[index]
        if self._last is not None and self._last is not table:
            self._last.forget()  # thirty subjects' pictures at once would be gigabytes
        self._last = table
        text, pictures = one["text"], table.pictures(row)
        if self._instruction:
            # An empty line stands between the options and the sentence.
            text += f"\n\n{ONE_LETTER}" if one["choices"] else f"\n{ONE_PHRASE}"
        if self._layout == "interleaved":
            text, images = _interleave(text, pictures)
        else:
            images = pictures[:1] if self._layout == "bunny" else [p for p in pictures if p]
        meta = {"id": one["id"], "source": file, "line": row, "group": one["subject"]}
        meta |= {"choices": list(one["choices"])} if one["choices"] else {}
        meta |= {"answers": list(one["answers"])} if one["answers"] else {"unscored": True}
        return Record((Message("user", text),), tuple(images), meta)


def _files(path: str | os.PathLike, split: str) -> list[Path]:
    path = need_path(path, _WHAT)
    found = sorted(path.rglob(f"{split}-*.parquet")) if path.is_dir() else [path]
    if not found:
        there = {f.name.partition("-")[0] for f in path.rglob("*.parquet")}
        raise MMJaxError(
            f"{path}: holds no {split}-*.parquet; there is {', '.join(sorted(there)) or 'none'}: "
            f"set split, or give {_WHAT}"
        )
    return found


def _question(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return id, subject, text with its options, choices and answers of a row."""
    name = text_of(row, "id", where)
    subject = (re.fullmatch(r"[a-z]+_(\w+)_\d+", name) or ("", ""))[1]
    if subject not in SUBJECTS:
        raise MMJaxError(
            f"{where}: the id {name!r} names the subject {subject!r}, none of MMMU's "
            f"{len(SUBJECTS)}; expected an id such as 'validation_Accounting_1'"
        )
    text = text_of(row, "question", where)
    choices: list[str] = []
    if text_of(row, "question_type", where) == "multiple-choice":
        choices = _listed(row["options"], where)
        if not 2 <= len(choices) <= len(LETTERS):
            raise MMJaxError(
                f"{where}: {len(choices)} options; expected 2 to {len(LETTERS)} of a question that "
                "is multiple-choice"
            )
        lines = (f"({a}) {c}" for a, c in zip(LETTERS, choices, strict=False))
        text = "\n".join([text, *lines])
    answers = _answers(row["answer"], choices, where)
    return {"id": name, "subject": subject, "text": text, "choices": choices, "answers": answers}


def _answers(value: Any, choices: Sequence[str], where: str) -> list[str]:
    """Return the right answers; none of a test split. Open ones may be a list written as text."""
    if value is None or value in _HIDDEN:
        return []
    if not choices:
        listed = value if isinstance(value, list) else None
        if isinstance(value, str) and value.lstrip().startswith("["):
            listed = _listed(value, where)
        return [str(a) for a in listed] if listed else [str(value)]
    if value not in list(LETTERS[: len(choices)]):
        raise MMJaxError(
            f"{where}: the answer is {value!r}, none of the options "
            f"{', '.join(LETTERS[: len(choices)])}"
        )
    # In brackets it names an option even where another option's text is this letter.
    return [f"({value})" if value in choices else value]


def _listed(value: Any, where: str) -> list[str]:
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise MMJaxError(
            f"{where}: {str(value)[:60]!r} is no list; expected text such as \"['red', 'blue']\""
        )
    return [str(one) for one in found]


def _interleave(text: str, pictures: Sequence[bytes]) -> tuple[str, list[bytes]]:
    """Put a mark where each picture is first named; a name without a picture gets an empty one."""
    shown: list[int] = []

    def mark(found: re.Match[str]) -> str:
        number = int(found[1])
        if number in shown:
            return found[0]
        shown.append(number)
        return IMAGE_MARK

    text = _MARK.sub(mark, text)
    named = [pictures[n - 1] if 1 <= n <= len(pictures) else b"" for n in shown]
    rest = [p for n, p in enumerate(pictures, 1) if p and n not in shown]
    return IMAGE_MARK * len(rest) + text, rest + named


def _read_annotations(path: str | os.PathLike) -> Mapping[str, Any]:
    found = read_json(path, _ANSWERS)
    if not isinstance(found, Mapping) or not found:
        raise MMJaxError(
            f"{path}: holds no object of answers by the questions' ids; give {_ANSWERS}"
        )
    return found


def _given(name: Any, given: Mapping[str, Any], path: Any, where: str) -> str | list[str]:
    if not isinstance(given.get(name), Mapping):
        raise MMJaxError(f"{where}: {path} has no answer to question {name!r}; give {_ANSWERS}")
    return field(given[name], "ground_truth", f"{path}: question {name}", (str, list))
