"""Sources by the name a recipe gives them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from mmjax.data.sources import Source
from mmjax.types import MMJaxError

KINDS = {
    "json": "mmjax.data.sources:JsonSource",
    "tfds": "mmjax.data.sources:TfdsSource",
    "easyvqa": "mmjax.data.easyvqa:EasyVQASource",
    "magnifier": "mmjax.data.magnifier:MagnifierSource",
}


def make_source(spec: Mapping[str, Any]) -> Source:
    """Build a source from ``{"kind": name, **arguments}``.

    Raises MMJaxError for an unknown kind or argument, naming the nearest.
    """
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MMJaxError(f"data source kind {kind!r} is unknown, one of {', '.join(KINDS)}{hint}")
    module, name = KINDS[kind].split(":")
    try:
        return getattr(importlib.import_module(module), name)(**arguments)
    except TypeError as error:
        raise MMJaxError(f"data source {dict(spec)}: {error}") from error
