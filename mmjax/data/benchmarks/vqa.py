"""Open questions with human answers: VQAv2, OK-VQA, TextVQA, VizWiz, DocVQA as published."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from mmjax.data.benchmarks.asking import ONE_PHRASE
from mmjax.data.benchmarks.files import field, need_pictures, read_json, read_lines, unique
from mmjax.types import Message, MMJaxError, Record

_WHAT = (
    "the questions as published: VQA's pair of questions and annotations (VQAv2, OK-VQA), or one "
    "file with both (TextVQA, VizWiz, DocVQA)"
)
_OCR = "LLaVA's llava_textvqa_val_v051_ocr.jsonl"
_PICTURES = "the folder that holds this split's pictures"


class VqaSource:
    """Questions about pictures, each with all of its answers.

    path: VQA's JSON ``{"questions": [{question_id, image_id, question}]}``; or questions with
        answers in one file: ``{"data": [...]}`` (TextVQA, DocVQA) or a list (VizWiz).
    annotations: VQA's JSON ``{"annotations": [{question_id, answers: [{answer}], answer_type}]}``
        to go with it; left out for a test split.
    images: the folder of the pictures. image_name: a picture's file by its id, such as
        ``COCO_val2014_{:012d}.jpg``, for a question without ``image``. Left out, a number is that
        of COCO's split which the questions name (``data_subtype``), and a text is the file's name,
        with .jpg where it has no ending.
    raw_answers: take OK-VQA's ``raw_answer``, what people wrote, for ``answer``, its stems.
    ocr: LLaVA's file of TextVQA's questions: each is asked in its words, the line "Reference OCR
        token: ..." behind it.
    meta: ``answers`` (``unscored`` where the file has none), ``group`` (``answer_type``). Raises
        MMJaxError for missing fields, answers, annotations and pictures, and ids given twice.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        images: str | os.PathLike,
        annotations: str | os.PathLike | None = None,
        image_name: str | None = None,
        raw_answers: bool = False,
        ocr: str | os.PathLike | None = None,
    ):
        key_of_answer = "raw_answer" if raw_answers else "answer"
        worded = None if ocr is None else _read_ocr(ocr)
        self.path = os.fspath(path)
        found = read_json(path, _WHAT)
        questions = found
        if isinstance(found, Mapping):
            questions = found.get("questions", found.get("data"))
        if not isinstance(questions, list) or not questions:
            raise MMJaxError(f"{path}: holds no list 'questions' or 'data'; give {_WHAT}")
        if annotations is not None:
            answers = _annotations(annotations, key_of_answer)
        elif isinstance(found, Mapping) and "questions" in found:
            answers = {}  # a test split
        else:
            answers = None  # they stand with the questions
        subtype = found.get("data_subtype") if isinstance(found, Mapping) else None
        rows, names = [], []
        for number, question in enumerate(questions):
            where = f"{path}: question {number}"
            if not isinstance(question, Mapping):
                raise MMJaxError(f"{where}: is a {type(question).__name__}; give {_WHAT}")
            text = field(question, "question", where)
            if worded is not None:
                text = _worded(question, text, worded, ocr, where)
            name, key = _picture(question, image_name, subtype, where), _key(question, where)
            if answers is None:
                right, kind = _answers(question, where, key_of_answer), question.get("answer_type")
            elif answers:
                if key not in answers:
                    raise MMJaxError(
                        f"{where}: {annotations} has no annotation of question {key}; give the "
                        "questions and annotations of the same split"
                    )
                right, kind = answers[key]
            else:
                right, kind = None, None
            rows.append((key, text, right, kind))
            names.append((name, where))
        unique([(row[0], where) for row, (_, where) in zip(rows, names, strict=True)], "question")
        self._rows, self._pictures = rows, need_pictures(images, names, _PICTURES)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        key, text, answers, kind = self._rows[index]
        meta: dict[str, Any] = {"id": str(key), "source": self.path, "line": index}
        meta |= {"unscored": True} if answers is None else {"answers": list(answers)}
        meta |= {"group": kind} if kind else {}
        return Record((Message("user", text),), (self._pictures[index],), meta)


def _annotations(
    path: str | os.PathLike, name: str
) -> dict[Any, tuple[tuple[str, ...], str | None]]:
    found = read_json(path, _WHAT)
    listed = found.get("annotations") if isinstance(found, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise MMJaxError(f"{path}: holds no list 'annotations'; give {_WHAT}")
    out = {}
    for number, one in enumerate(listed):
        where = f"{path}: annotation {number}"
        answers = _answers(one, where, name)
        if answers is None:
            raise MMJaxError(f"{where}: has no answers; leave annotations out for a test split")
        out[_key(one, where)] = answers, one.get("answer_type")
    return out


def _key(row: Mapping[str, Any], where: str) -> int | str:
    for name in ("question_id", "questionId", "image"):
        if name in row:
            return field(row, name, where, (int, str))
    return field(row, "question_id", where, (int, str))


def _read_ocr(path: str | os.PathLike) -> dict[tuple[str, str], str]:
    """Return (image id, question in small letters) -> question and OCR line in LLaVA's words."""
    out = {}
    for where, row in read_lines(path, _OCR):
        text = field(row, "text", where).removesuffix(f"\n{ONE_PHRASE}")
        asked = [one for one in text.split("\n") if not one.startswith(_OCR_LINE)]
        if len(asked) != 1 or _OCR_LINE not in text:
            raise MMJaxError(
                f"{where}: its text is {text[:80]!r}; expected a question and a line "
                f"'{_OCR_LINE} ...': give {_OCR}"
            )
        out[str(field(row, "question_id", where, (str, int))), asked[0].strip().lower()] = text
    return out


_OCR_LINE = "Reference OCR token:"


def _worded(
    row: Mapping[str, Any], text: str, worded: Mapping[tuple[str, str], str], ocr: Any, where: str
) -> str:
    key = str(row.get("image_id")), text.strip().lower()
    if key not in worded:
        raise MMJaxError(
            f"{where}: {ocr} has no question {text!r} about picture {key[0]!r}; give {_OCR}, and "
            "the questions of TextVQA's validation split"
        )
    return worded[key]


def _answers(row: Mapping[str, Any], where: str, name: str) -> tuple[str, ...] | None:
    """Read answers as texts or as VQA's objects; None where there is no such field."""
    listed = row.get("answers")
    if listed is None:
        return None
    if not isinstance(listed, list) or not listed:
        raise MMJaxError(f"{where}: its answers are {listed!r}; expected a list of at least one")
    texts = [a.get(name) if isinstance(a, Mapping) else a for a in listed]
    if not all(isinstance(text, str) for text in texts):
        raise MMJaxError(
            f"{where}: its answers are {str(listed)[:80]}; expected texts, or objects with {name!r}"
        )
    return tuple(sys.intern(text) for text in texts)  # most answers are given thousands of times


def _picture(
    row: Mapping[str, Any], image_name: str | None, subtype: str | None, where: str
) -> str:
    if isinstance(row.get("image"), str):
        return row["image"]
    key = field(row, "image_id", where, (int, str))
    if image_name is not None:
        try:
            return image_name.format(key)
        except (ValueError, IndexError, KeyError) as e:
            raise MMJaxError(
                f"{where}: image_name {image_name!r} does not fit the id {key!r} ({e}); write it "
                "like 'COCO_val2014_{:012d}.jpg'"
            ) from e
    if isinstance(key, str):
        return key if os.path.splitext(key)[1] else f"{key}.jpg"
    if not subtype:
        raise MMJaxError(
            f"{where}: its picture is the number {key}, and the file names no 'data_subtype'; give "
            "image_name, such as 'COCO_val2014_{:012d}.jpg'"
        )
    # test-dev2015 and test2015 share their pictures.
    return f"COCO_{re.sub(r'-.*?(?=[0-9])', '', subtype)}_{key:012d}.jpg"
