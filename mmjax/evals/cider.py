"""CIDEr of captions, by the package that published numbers come from."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.types import MMJaxError


def check() -> None:
    """Raise MMJaxError where pycocoevalcap, or a Java that runs its tokenizer, is missing."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise MMJaxError("CIDEr needs pycocoevalcap: pip install 'mmjax[captions]'")
    if shutil.which("java") is None:
        raise MMJaxError(
            "CIDEr needs Java: pycocoevalcap's tokenizer is a Java program; install one, such as "
            "apt-get install default-jre-headless, so that 'java' is on the PATH"
        )
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        found = PTBTokenizer().tokenize({0: [{"caption": "A cat."}]})
    except OSError as error:
        raise MMJaxError(
            f"CIDEr's tokenizer writes captions into its own folder and cannot: {error}; install "
            "pycocoevalcap where you may write, such as in an environment of your own"
        ) from error
    if found != {0: ["a cat"]}:
        raise MMJaxError(
            f"CIDEr's tokenizer made {found.get(0)} of 'A cat.': does 'java -version' run here?"
        )


def cider(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return 100 times CIDEr-D of the predictions against all captions of each picture.

    How rare a word is is counted over these very captions, so that a part of a split has other
    numbers than the whole (Vedantam et al. 2015, arXiv 1411.5726; COCO's PTB tokenizer).
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    known = [row for row in rows if "answer" in row]
    if not known:  # of no captions the package cannot tell how rare a word is
        return {"CIDEr": {"value": 0.0}}
    right = {
        i: [{"caption": _line(text)} for text in row.get("answers", [row["answer"]])]
        for i, row in enumerate(known)
    }
    said = {i: [{"caption": _line(row["prediction"])}] for i, row in enumerate(known)}
    tokenizer = PTBTokenizer()
    score, _ = Cider().compute_score(tokenizer.tokenize(right), tokenizer.tokenize(said))
    # One whose record could not be read scores nothing.
    return {"CIDEr": {"value": round(100 * float(score) * len(known) / len(rows), 4)}}


def _line(text: str) -> str:
    """Return a caption as one line: the tokenizer reads a file with one on each.

    The package replaces line feeds alone; any other line end would give each later caption to the
    picture before its own.
    """
    return " ".join(text.splitlines()).encode("utf-8", "replace").decode()
