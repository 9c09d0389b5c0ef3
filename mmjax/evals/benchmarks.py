"""Published benchmarks by name: a few settings become a whole task.

``{"benchmark": "pope", "path": ..., "images": ...}`` in ``eval.tasks``; any setting of ``Task``
beside them replaces the preset's. docs/evaluation.md says what each needs on disk.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from mmjax.data.benchmarks.asking import ONE_LETTER, ONE_PHRASE
from mmjax.data.catalog import KINDS
from mmjax.types import MMJaxError, nearest

SHORT = f"{{question}}\n{ONE_PHRASE}"
"""How LLaVA and Bunny ask for short answers."""

LETTER = f"{{question}}\n{ONE_LETTER}"
"""How they ask for one of several options."""

OTTER_LETTER = "Answer with the option letter from the given choices directly."
"""How Otter asks MagnifierBench, before the question."""

UNANSWERABLE = (
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    + ONE_PHRASE
)
"""How LLaVA asks VizWiz, where many questions have no answer."""

HATEFUL = "is an image with: '{question}' written on it. Is it hateful? Answer:"
"""How OpenFlamingo asks Hateful Memes, behind the picture."""

_CAPTION = dict(scorer="word_f1", summary="cider", max_new_tokens=20)
_LETTER = dict(prompt=LETTER, scorer="multiple_choice", max_new_tokens=16)
_VQA = dict(prompt=SHORT, scorer="vqa_accuracy", submission="vqa", max_new_tokens=16, cut="evalai")
# No cut: the scorer brings both sides into that form itself, and twice is another one.
_TEXT = _VQA | dict(scorer="vqa_accuracy_evalai", submission="textvqa", cut=None)


@dataclasses.dataclass(frozen=True)
class Preset:
    """kind: of the source, in ``data.catalog``. settings: of the task."""

    kind: str
    settings: Mapping[str, Any]


BENCHMARKS: dict[str, Preset] = {
    "coco_captions": Preset("karpathy", _CAPTION),
    "flickr30k_captions": Preset("karpathy", _CAPTION),
    "magnifierbench": Preset(
        "magnifierbench", _LETTER | dict(prompt=f"{OTTER_LETTER} {{question}}", chance=0.25)
    ),
    "scienceqa": Preset("scienceqa", _LETTER),
    "mmbench": Preset("mmbench", _LETTER | dict(summary="circular", submission="mmbench")),
    "seedbench": Preset("seedbench", _LETTER | dict(summary="seedbench", submission="seedbench")),
    "ai2d": Preset("ai2d", _LETTER),
    "mmmu": Preset(
        "mmmu", dict(scorer="mmmu", summary="mmmu", submission="mmmu", max_new_tokens=128)
    ),
    "mmvet": Preset("mmvet", dict(submission="mmvet", max_new_tokens=1024)),
    "mme": Preset("mme", dict(scorer="yes_no", summary="mme", max_new_tokens=16)),
    "gqa": Preset("gqa", dict(prompt=SHORT, scorer="gqa", summary="gqa", submission="gqa")),
    "hateful_memes": Preset(
        "hateful_memes",
        dict(
            prompt=HATEFUL,
            rank="mean_likelihood",
            options=("no", "yes"),
            scorer="exact_match_strict",
            summary="roc_auc",
        ),
    ),
    "imagenet": Preset(
        "imagenet",
        dict(rank="mean_likelihood", scorer="exact_match_strict", summary="top_5"),
    ),
    "vqav2": Preset("vqa", _VQA),
    "okvqa": Preset("vqa", _VQA),
    "textvqa": Preset("vqa", _TEXT),
    "vizwiz": Preset("vqa", _TEXT | dict(prompt=UNANSWERABLE, submission="vizwiz")),
    "chartqa": Preset("chartqa", dict(prompt=SHORT, scorer="relaxed_accuracy", max_new_tokens=16)),
    "docvqa": Preset(
        "vqa", dict(prompt=SHORT, scorer="anls", submission="docvqa", max_new_tokens=32)
    ),
    "pope": Preset(
        "pope", dict(prompt=SHORT, scorer="yes_no", summary="yes_no", max_new_tokens=16)
    ),
}


def expand(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the settings of the task that a benchmark's name and files stand for.

    What the source takes (``path``, ``images``, ...) goes there, the rest to the task. Raises
    MMJaxError for an unknown benchmark, a missing file setting, and a ``source`` beside it.
    """
    given = dict(config)
    name = given.pop("benchmark")
    if not isinstance(name, str) or name not in BENCHMARKS:
        raise MMJaxError(
            f"{path}.benchmark is {name!r}{nearest(str(name), BENCHMARKS)} "
            f"(there are {', '.join(BENCHMARKS)})"
        )
    if "source" in given:
        raise MMJaxError(
            f"{path}: benchmark {name!r} makes its source itself; leave 'source' out, or leave "
            "'benchmark' out and write the whole task"
        )
    preset = BENCHMARKS[name]
    takes = _parameters(preset.kind)
    source = {"kind": preset.kind} | {k: given.pop(k) for k in list(given) if k in takes}
    missing = [k for k, p in takes.items() if p.default is p.empty and k not in source]
    if missing:
        raise MMJaxError(
            f"{path}: benchmark {name!r} needs {' and '.join(missing)}; see docs/evaluation.md"
        )
    # A split that the source takes names the result, too.
    named = {"split": source.get("split", takes["split"].default)} if "split" in takes else {}
    return {"name": name, "source": source} | named | dict(preset.settings) | given


def source_settings(source: Any) -> str | None:
    """Say how a benchmark's source asks: its settings, and of optional files that they are given.

    Runs that were asked otherwise are told apart by it, wherever their files lie. None for any
    other source.
    """
    kinds = {preset.kind for preset in BENCHMARKS.values()}
    if not isinstance(source, Mapping) or source.get("kind") not in kinds:
        return None
    said = [source["kind"]]
    for name, parameter in _parameters(source["kind"]).items():
        value = source.get(name, parameter.default)
        if "PathLike" not in str(parameter.annotation):
            said.append(f"{name}={value}")
        elif parameter.default is None and value is not None:
            said.append(f"with {name}")
    return ", ".join(said)


def _parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    module, name = KINDS[kind].split(":")
    return inspect.signature(getattr(importlib.import_module(module), name)).parameters
