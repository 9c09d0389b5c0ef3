"""MME (Fu et al. 2023, arXiv 2306.13394): two questions about each picture, one yes and one no."""

from __future__ import annotations

import os
from pathlib import Path

from mmjax.data.benchmarks.files import need_path
from mmjax.data.benchmarks.tables import Table, text_of
from mmjax.types import Message, MMJaxError, Record

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
_SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG", ".JPEG")
_INSTRUCTION = "Please answer yes or no."
_WHAT = "the folder MME_Benchmark with a folder for each subtask, or the hub's parquet files"


class MmeSource:
    """MME's questions, each answered ``yes`` or ``no``, the two of a picture side by side.

    path: the folder with one for each subtask, ``count/000.txt`` beside ``count/000.jpg``, or
        ``posters/questions_answers_YN/*.txt`` beside ``posters/images/``; a line is a question, a
        tab and Yes or No. Or parquet: ``question_id``, ``category``, ``question``, ``answer``,
        ``image`` (lmms-lab/MME).
    instruction: keep the "Please answer yes or no." that ends each question. LLaVA and Bunny take
        it away and ask for a single word or phrase instead.
    meta: ``answers``, ``group`` (the subtask), ``unit`` (the picture). ``units``: the two
        questions of each picture. Raises MMJaxError for a picture with other than two questions,
        a subtask that MME does not have, a picture that is missing.
    """

    def __init__(self, path: str | os.PathLike, instruction: bool = True):
        path = need_path(path, _WHAT)
        self._table: Table | None = None
        tables = path.is_file() or any(path.rglob("*.parquet"))
        rows = self._read_table(path) if tables else _read_folder(path)
        pairs: dict[str, list[int]] = {}
        for i, (subtask, picture, *_, where) in enumerate(rows):
            if subtask not in PERCEPTION + COGNITION:
                raise MMJaxError(
                    f"{where}: {subtask!r} is no subtask of MME "
                    f"({', '.join(PERCEPTION + COGNITION)}); give {_WHAT}"
                )
            pairs.setdefault(f"{subtask}/{picture}", []).append(i)
        self._rows, self.units = [], []
        for unit, members in pairs.items():
            where = rows[members[-1]][-1]
            if len(members) != 2:
                raise MMJaxError(
                    f"{where}: picture {unit} has {len(members)} question(s); accuracy+ needs two "
                    f"of each picture: give {_WHAT}, whole"
                )
            self.units.append((len(self._rows), len(self._rows) + 1))
            self._rows += [(unit, rows[i]) for i in members]
        self._instruction = instruction

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        unit, (subtask, _, question, label, image, where) = self._rows[index]
        if not self._instruction:
            question = question.replace(_INSTRUCTION, "").strip()
        file, _, line = where.rpartition(":")
        meta = {
            "id": f"{unit}:{index % 2 + 1}",
            "source": file,
            "line": int(line),
            "answers": [label],
            "group": subtask,
            "unit": unit,
        }
        picture = self._table.picture(image) if self._table else image
        return Record((Message("user", question),), (picture,), meta)

    def _read_table(self, path: Path) -> list[tuple]:
        columns = ("question_id", "category", "question", "answer")
        self._table = Table(path, "image", columns)
        rows = []
        for i, (where, row) in enumerate(self._table.rows):
            question_id, category, question, answer = (text_of(row, c, where) for c in columns)
            picture = question_id.rpartition("/")[2]
            rows.append((category, picture, question, _label(answer, where), i, where))
        return rows


def _read_folder(path: Path) -> list[tuple]:
    """Read (subtask, picture, question, label, path of the picture, place) of every line."""
    rows = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        texts = folder / "questions_answers_YN"
        texts, pictures = (texts, folder / "images") if texts.is_dir() else (folder, folder)
        there = {p.name for p in pictures.iterdir()} if pictures.is_dir() else set()
        for file in sorted(texts.glob("*.txt")):
            name = next((file.stem + s for s in _SUFFIXES if file.stem + s in there), None)
            if name is None:
                raise MMJaxError(
                    f"{file}:1: there is no picture {file.stem}{_SUFFIXES[0]} or {_SUFFIXES[1]} in "
                    f"{pictures}; give {_WHAT}"
                )
            for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
                if line.strip():
                    where = f"{file}:{number}"
                    question, tab, answer = line.strip().rpartition("\t")
                    if not tab:
                        raise MMJaxError(
                            f"{where}: {line[:60]!r} has no tab; expected a question, a tab, and "
                            "Yes or No"
                        )
                    label = _label(answer, where)
                    rows.append(
                        (folder.name, name, question.strip(), label, str(pictures / name), where)
                    )
    if not rows:
        raise MMJaxError(f"{path}: holds no questions; give {_WHAT}")
    return rows


def _label(answer: str, where: str) -> str:
    label = answer.strip().lower().rstrip(".")
    if label not in ("yes", "no"):
        raise MMJaxError(f"{where}: the answer is {answer!r}; expected Yes or No")
    return label
