"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): school questions with two to five options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.benchmarks.files import field, need_path, need_pictures, read_json
from mmjax.data.benchmarks.tables import Table
from mmjax.types import Message, MMJaxError, Record

LETTERS = "ABCDEFGHIJ"
_WHAT = "ScienceQA's problems.json, or the hub's parquet files"
_SPLITS = "ScienceQA's pid_splits.json"
_PICTURES = "the folder with a folder for each question of this split, <id>/image.png"


class ScienceQaSource:
    """ScienceQA's questions, by default those with a picture.

    path: ``problems.json``, with ``pid_splits.json`` beside it (or at ``splits``), ``split`` one of
        its splits and ``images`` the folder of ``<id>/image.png``, or of ``<split>/<id>/``. Or one
        split's parquet files with ``question``, ``choices``, ``answer``, ``hint`` and ``image``
        (derek-thomas/ScienceQA).
    pictures_only: leave questions of text alone away; LLaVA's and Bunny's "IMG" accuracy.
    meta: ``answers`` (a letter), ``choices``, ``group`` (natural, social or language science).
        Raises MMJaxError for missing fields and pictures, and an answer that is no option.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        images: str | os.PathLike | None = None,
        split: str = "test",
        splits: str | os.PathLike | None = None,
        pictures_only: bool = True,
    ):
        self.path = os.fspath(need_path(path, _WHAT))
        self._table: Table | None = None
        if Path(path).suffix == ".json":
            rows = _read_problems(Path(path), images, split, splits, pictures_only)
        else:
            columns = ("question", "choices", "answer", "hint")
            self._table = Table(path, "image", columns, ("subject",))
            rows = [(str(i), row, i, where) for i, (where, row) in enumerate(self._table.rows)]
            # Which have one can only be told by looking.
            rows = [r for r in rows if not pictures_only or self._table.picture(r[2])]
        self._rows = [(key, *_lay_out(row, where), image) for key, row, image, where in rows]
        if not self._rows:
            raise MMJaxError(f"{path}: holds no questions with a picture; give {_WHAT}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        key, asked, choices, letter, subject, image = self._rows[index]
        answer = f"({letter})" if letter in choices else letter
        meta: dict[str, Any] = {"id": key, "source": self.path, "line": index}
        meta |= {"answers": [answer], "choices": choices}
        meta |= {"group": subject} if subject else {}
        picture = self._table.picture(image) if self._table else image
        return Record((Message("user", asked),), (picture,) if picture else (), meta)


def _lay_out(row: Mapping[str, Any], where: str) -> tuple[str, list[str], str, str | None]:
    """Return (question with hint and options, options, letter of the answer, subject)."""
    question, answer = field(row, "question", where), field(row, "answer", where, int)
    choices = field(row, "choices", where, list)
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise MMJaxError(
            f"{where}: the answer is {answer} of {len(choices)} options; expected 0 to "
            f"{len(choices) - 1}, and at most {len(LETTERS)} options"
        )
    hint = row.get("hint") or ""
    lines = [f"Context: {hint}"] if hint.strip() else []
    lines += [question, *(f"{a}. {c}" for a, c in zip(LETTERS, choices, strict=False))]
    return "\n".join(lines), list(choices), LETTERS[answer], row.get("subject")


def _read_problems(
    path: Path,
    images: str | os.PathLike | None,
    split: str,
    splits: str | os.PathLike | None,
    pictures_only: bool,
) -> Sequence[tuple[str, Mapping[str, Any], str, str]]:
    """Return (id, problem, path of its picture or "", place) of a split's problems."""
    problems = read_json(path, _WHAT)
    places = path.parent / "pid_splits.json" if splits is None else splits
    named = read_json(places, _SPLITS)
    if split not in named:
        raise MMJaxError(f"{places}: has no split {split!r}; it has {', '.join(named)}")
    rows, pictures = [], []
    for key in named[split]:
        where = f"{path}: problem {key}"
        if key not in problems:
            raise MMJaxError(f"{where}: is missing, and {places} names it; give {_WHAT}, whole")
        if problems[key].get("image"):
            pictures.append((f"{key}/{problems[key]['image']}", where))
            rows.append((key, problems[key], True, where))
        elif not pictures_only:
            rows.append((key, problems[key], False, where))
    if pictures and images is None:
        raise MMJaxError(f"{path}: give images, {_PICTURES}")
    inner = Path(images, split) if images is not None else None
    root = inner if inner is not None and inner.is_dir() else images
    paths = iter(need_pictures(root, pictures, _PICTURES) if pictures else ())
    return [(key, row, next(paths) if has else "", where) for key, row, has, where in rows]
