"""Mappings to frozen dataclasses, strictly: every problem is named at once, with its path."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from mmjax.types import MMJaxError, nearest

T = TypeVar("T")


def to_dataclass(cls: type[T], config: Any, path: str = "config") -> T:
    """Make an instance of a dataclass from a ConfigDict or a mapping, strictly.

    Nested dataclasses, ``tuple``, ``list``, ``dict``, ``Optional``, ``Union`` and ``Literal`` are
    followed; an int is taken where a float is expected, nothing else is converted. Raises
    MMJaxError that lists every unknown key (with the nearest name), missing key and wrong type,
    each by its dotted path.
    """
    problems: list[str] = []
    made = _build(cls, config, path, problems)
    if problems:
        raise MMJaxError("\n".join(problems))
    return made


def is_mapping(value: Any) -> bool:
    """Tell a mapping, ConfigDict included (which is none of the standard ABCs)."""
    return isinstance(value, Mapping) or all(
        hasattr(value, name) for name in ("keys", "items", "to_dict")
    )


def _build(cls: type, config: Any, path: str, problems: list[str]) -> Any:
    """Make one dataclass; on any problem append to ``problems`` and return None."""
    if isinstance(config, cls):
        return config
    if not is_mapping(config):
        problems.append(_wrong(path, config, f"settings of {cls.__name__}"))
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    before, values = len(problems), {}
    for key, value in config.items():
        if key not in fields:
            known = ", ".join(fields)
            hint = nearest(str(key), fields)
            problems.append(f"unknown config key {path}.{key}{hint} ({path} has: {known})")
        else:
            values[key] = _convert(hints[key], value, f"{path}.{key}", problems)
    for name, field in fields.items():
        if name not in values and _has_no_default(field):
            problems.append(
                f"{path}.{name} is missing and has no default; expected {_name(hints[name])}"
            )
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except (ValueError, MMJaxError) as e:  # a dataclass that checks itself in __post_init__
        problems.append(f"{path}: {e}")
        return None


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """Check a value against a type and convert what is inside it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value.to_dict() if hasattr(value, "to_dict") else value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, problems)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, args, value, path, problems)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            hint_text = nearest(str(value), args) if isinstance(value, str) else ""
            problems.append(_wrong(path, value, f"one of {', '.join(map(repr, args))}") + hint_text)
        return value
    kind = origin or hint
    if kind is tuple or hint is tuple:
        return _convert_tuple(hint, args, value, path, problems)
    if kind in (list, collections.abc.Sequence) and not isinstance(value, str):
        if isinstance(value, list | tuple):
            inner = args[0] if args else Any
            made = [_convert(inner, v, f"{path}[{i}]", problems) for i, v in enumerate(value)]
            return made if kind is list else tuple(made)
    elif kind in (dict, collections.abc.Mapping):
        if is_mapping(value):
            key, inner = args or (Any, Any)
            if wrong := [k for k in value if key is str and not isinstance(k, str)]:
                problems.append(_wrong(f"a key of {path}", wrong[0], "a name in quotes"))
                return None
            return {k: _convert(inner, v, f"{path}.{k}", problems) for k, v in value.items()}
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind is None or kind is type(None):
        if value is None:
            return None
    elif kind is collections.abc.Callable:
        if callable(value):
            return value
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    problems.append(_wrong(path, value, _name(hint)))
    return None


def _convert_tuple(hint: Any, args: tuple, value: Any, path: str, problems: list[str]) -> Any:
    """Convert a list or tuple to ``tuple[X, ...]``, ``tuple[X, Y]`` or a bare tuple."""
    if not isinstance(value, list | tuple):
        problems.append(_wrong(path, value, _name(hint)))
        return None
    if not args:
        return tuple(value)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        problems.append(_wrong(path, value, f"{_name(hint)}, {len(args)} values"))
        return None
    pairs = enumerate(zip(args, value, strict=True))
    return tuple(_convert(a, v, f"{path}[{i}]", problems) for i, (a, v) in pairs)


def _convert_union(hint: Any, args: tuple, value: Any, path: str, problems: list[str]) -> Any:
    """Take the first alternative that fits; with one dataclass inside, report its own problems."""
    tries = []
    # Exact types first, so that 3 stays an int in `float | int`.
    for arg in sorted(args, key=lambda a: type(value) is not a):
        mine: list[str] = []
        made = _convert(arg, value, path, mine)
        if not mine:
            return made
        tries.append((arg, mine))
    if len(args) == 2 and type(None) in args and typing.get_origin(args[0]) is Literal:
        names = typing.get_args(args[0])
        hint_text = nearest(value, names) if isinstance(value, str) else ""
        told = f"one of {', '.join(map(repr, names))} or None"
        problems.append(_wrong(path, value, told) + hint_text)
        return None
    inner = [mine for arg, mine in tries if dataclasses.is_dataclass(arg) and is_mapping(value)]
    problems.extend(inner[0] if len(inner) == 1 else [_wrong(path, value, _name(hint))])
    return None


def _wrong(path: str, value: Any, expected: str) -> str:
    value = (
        value.to_dict() if hasattr(value, "to_dict") else value
    )  # a ConfigDict has several lines
    return f"{path}: expected {expected}, got {type(value).__name__} {value!r}"


def _name(hint: Any) -> str:
    """Write a type the way it stands in the source."""
    if typing.get_args(hint):
        return str(hint).replace("typing.", "").replace("collections.abc.", "")
    return getattr(hint, "__name__", str(hint))
