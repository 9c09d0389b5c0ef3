"""What differs from the settings that a workdir was last started with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.train.settings import RunSettings

_SHOWN = 200  # letters of a value in a message
_NOTHING = object()


def last_started(workdir: Path) -> dict[str, Any]:
    """Read the settings that a workdir was last started with; empty where there are none whole."""
    try:
        found = json.loads((workdir / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def changed(settings: RunSettings, workdir: Path) -> dict[str, str]:
    """Return what differs from the settings that a workdir was last started with.

    Dotted name -> a line that tells it. A checkpoint holds what is trained alone: whatever else
    makes a model, ``model.init`` above all, is what the settings say today.
    """
    was, usual = last_started(workdir), json.loads(as_json(RunSettings()))
    if not was:
        return {}
    return _differing(was, json.loads(as_json(settings)), usual, "config")


def about_frozen(changes: Mapping[str, str], frozen: bool) -> list[str]:
    """Return a line of warning where the frozen part comes from elsewhere than it did.

    changes: of ``changed``. frozen: whether the model has parameters that are not trained. Another
    model of the same shapes cannot be told from the same one in another place.
    """
    keys = ("config.model.init", "config.model.parts")
    found = [name for name in changes if name.startswith(keys)]
    if not (frozen and found):
        return []
    return [
        f"warning: what is not trained is read from another place than before ({', '.join(found)}),"
        " and no checkpoint holds it. Where that is another model, and not the same one moved, "
        "what was trained does not belong to it: stop now (SIGKILL saves nothing) and set it back"
    ]


def _differing(was: Any, now: Any, usual: Any, name: str) -> dict[str, str]:
    if not (isinstance(was, dict) and isinstance(now, dict)):
        differ = was is _NOTHING or now is _NOTHING or was != now
        return {name: f"{name} was {_show(was)} and is {_show(now)}"} if differ else {}
    found: dict[str, str] = {}
    for key in dict.fromkeys([*now, *was]):
        old, new = was.get(key, _NOTHING), now.get(key, _NOTHING)
        own = usual.get(key, _NOTHING) if isinstance(usual, dict) else _NOTHING
        if old is _NOTHING and new == own:  # a setting that the version before did not have
            continue
        found |= _differing(old, new, own, f"{name}.{key}")
    return found


def _show(value: Any) -> str:
    text = "not set" if value is _NOTHING else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def as_json(settings: RunSettings) -> str:
    """Write settings as a workdir's config.json has them."""
    return json.dumps(dataclasses.asdict(settings), indent=1, default=str)
