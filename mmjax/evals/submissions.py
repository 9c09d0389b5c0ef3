"""Files that a benchmark's server takes, for splits whose answers it keeps to itself."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from mmjax.evals import normalise
from mmjax.types import MMJaxError, nearest

Row = Mapping[str, Any]


def mmbench(rows: Sequence[Row]) -> bytes:
    """Return an Excel file with ``index``, ``question``, ``A`` to ``D`` and ``prediction``."""
    table: list[list[Any]] = [["index", "question", *"ABCD", "prediction"]]
    for row in rows:
        options = [*row.get("choices", ()), "", "", "", ""][:4]
        table.append([int(row["id"]), row.get("question", ""), *options, row["prediction"]])
    return spreadsheet(table)


def vqa(rows: Sequence[Row], form: Callable[[str], str] = normalise.official) -> bytes:
    """Return JSON ``[{"question_id", "answer"}]``, as EvalAI takes for VQAv2.

    Answers are normalised as the peers normalise them: where all humans agree the server does not.
    """
    return _json([{"question_id": _number(r["id"]), "answer": form(r["prediction"])} for r in rows])


def textvqa(rows: Sequence[Row]) -> bytes:
    """Return the same for TextVQA, whose answers nothing has cut yet, in ``normalise.evalai``."""
    return vqa(rows, normalise.evalai)


def vizwiz(rows: Sequence[Row]) -> bytes:
    """Return JSON ``[{"image", "answer"}]``, the picture's file name, for VizWiz on EvalAI."""
    return _json(
        [
            {"image": os.path.basename(r["image"]), "answer": normalise.evalai(r["prediction"])}
            for r in rows
        ]
    )


def gqa(rows: Sequence[Row]) -> bytes:
    """Return JSON ``[{"questionId", "prediction"}]``, as GQA's eval.py and its server take."""
    return _json(
        [{"questionId": r["id"], "prediction": r["prediction"].rstrip(".").lower()} for r in rows]
    )


def docvqa(rows: Sequence[Row]) -> bytes:
    """Return JSON ``[{"questionId", "answer"}]``, as the Robust Reading Competition takes."""
    return _json([{"questionId": _number(r["id"]), "answer": r["prediction"]} for r in rows])


def mmmu(rows: Sequence[Row]) -> bytes:
    """Return JSON ``{id: answer}``, a letter where there are options, for MMMU on EvalAI.

    Its main_eval_only.py reads that of the validation split. Where no letter was chosen the answer
    stands as it is, which counts as wrong.
    """
    said = {r["id"]: r.get("read") if r.get("choices") else r["prediction"] for r in rows}
    return _json({r["id"]: said[r["id"]] or r["prediction"] for r in rows})


def mmvet(rows: Sequence[Row]) -> bytes:
    """Return JSON ``{id: answer}``, as MM-Vet's evaluator takes, which asks GPT-4."""
    return _json({r["id"]: r["prediction"] for r in rows})


def seedbench(rows: Sequence[Row]) -> bytes:
    """Return JSON lines {"question_id", "prediction"}, a letter, for SEED-Bench's leaderboard."""
    lines = ({"question_id": r["id"], "prediction": r.get("read") or r["prediction"]} for r in rows)
    return b"".join(map(_json, lines))


SUBMISSIONS: dict[str, tuple[str, Callable[[Sequence[Row]], bytes]]] = {
    "docvqa": (".json", docvqa),
    "gqa": (".json", gqa),
    "mmbench": (".xlsx", mmbench),
    "mmmu": (".json", mmmu),
    "mmvet": (".json", mmvet),
    "seedbench": (".jsonl", seedbench),
    "textvqa": (".json", textvqa),
    "vizwiz": (".json", vizwiz),
    "vqa": (".json", vqa),
}
"""Name -> the ending of the file, and what makes it of all rows of a result."""


def get_submission(name: str) -> tuple[str, Callable[[Sequence[Row]], bytes]]:
    """Return a submission's ending and maker by name; raises MMJaxError with the nearest."""
    if name not in SUBMISSIONS:
        raise MMJaxError(
            f"unknown submission {name!r}{nearest(name, SUBMISSIONS)} (there are "
            f"{', '.join(SUBMISSIONS)})"
        )
    return SUBMISSIONS[name]


def spreadsheet(table: Sequence[Sequence[Any]]) -> bytes:
    """Return a table as an Excel file (Office Open XML, one sheet, text inline)."""
    lines = []
    for row in table:
        cells = "".join(
            f"<c><v>{value}</v></c>"
            if isinstance(value, int)
            else f'<c t="inlineStr"><is><t xml:space="preserve">{_clean(value)}</t></is></c>'
            for value in row
        )
        lines.append(f"<row>{cells}</row>")
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    links = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kind}.worksheet+xml"/>'
        "</Types>",
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{links}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{links}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="r1" Type="{links}/worksheet" Target="worksheets/sheet1.xml"/>'
        "</Relationships>",
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{"".join(lines)}'
        "</sheetData></worksheet>",
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
            # A ZipInfo has no time of its own: the same answers are the same bytes.
            data = (head + text).encode("utf-8", "replace")
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _clean(value: Any) -> str:
    """Escape a text for XML, which has neither control characters nor U+FFFE and U+FFFF."""
    kept = (c for c in str(value) if c in "\t\n\r" or (c >= " " and c not in "\ufffe\uffff"))
    return escape("".join(kept))


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text
