"""Sources by the name a recipe gives them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from mmjax.data.sources import Source
from mmjax.types import MMJaxError, nearest

KINDS = {
    "json": "mmjax.data.sources:JsonSource",
    "tfds": "mmjax.data.tfds_source:TfdsSource",
    "tfds_interleaved": "mmjax.data.tfds_pretraining:TfdsInterleaved",
    "tfds_pairs": "mmjax.data.tfds_pretraining:TfdsPairs",
    "mimicit": "mmjax.data.mimicit:MimicitSource",
    "parquet": "mmjax.data.parquet:ParquetSource",
    "laion": "mmjax.data.webdataset:LaionSource",
    "mmc4": "mmjax.data.mmc4:Mmc4Source",
    "array_record": "mmjax.data.array_record:ArrayRecordSource",
    "easyvqa": "mmjax.data.easyvqa:EasyVQASource",
    "easyvqa_captions": "mmjax.data.easyvqa:EasyVQACaptions",
    "emoji": "mmjax.data.emoji:EmojiSource",
    "magnifier": "mmjax.data.magnifier:MagnifierSource",
    "sums": "mmjax.data.sums:SumsSource",
    "ai2d": "mmjax.data.benchmarks.ai2d:Ai2dSource",
    "chartqa": "mmjax.data.benchmarks.chartqa:ChartQaSource",
    "gqa": "mmjax.data.benchmarks.gqa:GqaSource",
    "hateful_memes": "mmjax.data.benchmarks.hateful_memes:HatefulMemesSource",
    "imagenet": "mmjax.data.benchmarks.imagenet:ImageNetSource",
    "karpathy": "mmjax.data.benchmarks.captions:KarpathySource",
    "magnifierbench": "mmjax.data.benchmarks.magnifierbench:MagnifierBenchSource",
    "mmbench": "mmjax.data.benchmarks.mmbench:MmbenchSource",
    "mmmu": "mmjax.data.benchmarks.mmmu:MmmuSource",
    "mme": "mmjax.data.benchmarks.mme:MmeSource",
    "pope": "mmjax.data.benchmarks.pope:PopeSource",
    "mmvet": "mmjax.data.benchmarks.mmvet:MmVetSource",
    "scienceqa": "mmjax.data.benchmarks.scienceqa:ScienceQaSource",
    "seedbench": "mmjax.data.benchmarks.seedbench:SeedBenchSource",
    "vqa": "mmjax.data.benchmarks.vqa:VqaSource",
}
LISTS = {
    "mimicit_yaml": "mmjax.data.mimicit_yaml:expand_yaml",
    "instruct_flamingo": "mmjax.data.instruct_config:expand_config",
}
"""Kinds that stand for several sources: a function from arguments to name -> specification."""
_PLACES = ("path", "mimicit_path", "name")  # settings that say where a source's records are


def make_source(spec: Mapping[str, Any]) -> Source:
    """Build a source from ``{"kind": name, **arguments}``.

    Raises MMJaxError for an unknown kind or argument, naming the nearest.
    """
    if _stands_for_several(spec):
        raise MMJaxError(
            f"data source kind {spec['kind']!r} stands for several sources; it can be named in "
            "data.sources, and here only one of its datasets, with that dataset's own kind "
            "(mimicit, json)"
        )
    return _call(spec, KINDS)


def make_sources(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Source]:
    """Build the sources of ``data.sources``, name -> specification; lists are expanded.

    A kind that stands for several sources adds each under its own name. Raises MMJaxError naming
    the source that is wrong, empty, or of a name that is taken.
    """
    single: dict[str, Mapping[str, Any]] = {}
    for name, spec in specs.items():
        expanded = _call(spec, LISTS) if _stands_for_several(spec) else {name: spec}
        for inner, one in expanded.items():
            if inner in single:
                raise MMJaxError(
                    f"two data sources are called {inner!r} (one is from data.sources.{name}); "
                    "rename one"
                )
            single[inner] = one
    return {name: _named(name, spec) for name, spec in single.items()}


def _stands_for_several(spec: Mapping[str, Any]) -> bool:
    return str(spec.get("kind")) in LISTS


def _named(name: str, spec: Mapping[str, Any]) -> Source:
    """Build one source; an error says which it was."""
    try:
        source = make_source(spec)
        if len(source) == 0:
            where = next((spec[k] for k in _PLACES if k in spec), f"kind {spec['kind']!r}")
            raise MMJaxError(f"{where} holds no records; check it, or remove the source")
    except MMJaxError as error:
        raise MMJaxError(f"data.sources.{name}: {error}") from error
    return source


def _call(spec: Mapping[str, Any], kinds: Mapping[str, str]) -> Any:
    """Import what a kind names and call it with the specification's other values."""
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        every = [*KINDS, *LISTS]
        if kind is None:
            raise MMJaxError(f"a data source needs a kind, one of {', '.join(every)}")
        near = nearest(str(kind), every)
        raise MMJaxError(f"data source kind {kind!r} is unknown, one of {', '.join(every)}{near}")
    module, name = kinds[kind].split(":")
    made = getattr(importlib.import_module(module), name)
    try:
        return made(**arguments)
    except TypeError as error:
        takes = inspect.signature(made).parameters
        said = _wrong_setting(arguments, takes) or error
        raise MMJaxError(
            f"data source {dict(spec)}: {said}; kind {kind!r} takes {', '.join(takes)}"
        ) from error


def _wrong_setting(given: Mapping[str, Any], takes: Mapping[str, inspect.Parameter]) -> str | None:
    """Say which setting is unknown or missing, None where it is neither."""
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        for name in given:
            if name not in takes:
                return f"there is no setting {name!r}{nearest(name, takes)}"
    needed = (name for name, p in takes.items() if p.default is p.empty and p.kind < p.VAR_KEYWORD)
    missing = next((name for name in needed if name not in given), None)
    return None if missing is None else f"{missing!r} is missing"
