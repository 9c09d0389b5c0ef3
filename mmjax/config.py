"""Recipes to frozen dataclasses: the one place of the library that sees a ConfigDict.

A recipe is a Python file with ``get_config(arg=None) -> ConfigDict``. ``resolve_recipe`` loads it
and applies overrides as the command line does; ``to_dataclass`` makes typed settings of it.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from mmjax.types import MMJaxError

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


def fill(cls: type, values: Mapping[str, Any]) -> Any:
    """Return a ConfigDict with every setting of a dataclass, ``values`` laid over the defaults.

    A recipe names what it chooses; filled, any other setting can be overridden on the command line
    too. Raises MMJaxError as ``to_dataclass`` does.
    """
    from ml_collections import ConfigDict

    made = to_dataclass(cls, values)
    # convert_dict=False would keep free-form dicts plain, but then nothing in them could be set.
    return ConfigDict(dataclasses.asdict(made))


def resolve_recipe(recipe: str | os.PathLike, overrides: Iterable[str] = ()) -> Any:
    """Load ``configs/x.py`` or ``configs/x.py:arg`` and return its locked ConfigDict.

    overrides: ``optim.lr=3e-5``, also with the ``--config.`` of the command line in front.
    Raises MMJaxError for a missing file, an argument the recipe does not take, an unknown key or
    a value of the wrong type, with the nearest name.
    """
    file, arg = split_recipe(recipe)
    module = _load_module(file)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise MMJaxError(f"{file} is no recipe: it has no function get_config(arg=None)")
    if arg is not None and not inspect.signature(get_config).parameters:
        raise MMJaxError(f"{file} takes no argument, got {arg!r}; write --config={file}")
    try:
        config = get_config() if arg is None else get_config(arg)
    except ValueError as e:
        if arg is None:
            raise
        raise MMJaxError(f"{file} does not take the argument {arg!r}: {e}") from e
    config.lock()
    return apply_overrides(config, overrides)


def recipe_options(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Parse a recipe's argument such as ``quick,steps=20`` into options, typed by the defaults.

    A bare name sets a bool. Raises MMJaxError for an unknown name (with the nearest) or a value
    that is not of the default's type.
    """
    options = dict(defaults)
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, has_value, text = item.partition("=")
        if name not in options:
            raise MMJaxError(
                f"unknown recipe argument {name!r}{nearest(name, options)}; "
                f"this recipe takes: {', '.join(options)}"
            )
        value: Any = _literal(text) if has_value else True
        kind = type(defaults[name])
        if kind is float and type(value) is int:
            value = float(value)
        if kind is str and not isinstance(value, bool):
            value = text
        if defaults[name] is not None and type(value) is not kind:
            raise MMJaxError(
                f"recipe argument {item!r}: expected {name}={kind.__name__}, got {value!r}"
            )
        options[name] = value
    return types.SimpleNamespace(**options)


def apply_overrides(config: Any, overrides: Iterable[str]) -> Any:
    """Return the ConfigDict with ``a.b=value`` overrides applied, parsed by each field's type."""
    arguments = [_override(config, item) for item in overrides]
    for name, text in arguments:
        _set(config, name, text)
    return config


def split_recipe(recipe: str | os.PathLike) -> tuple[str, str | None]:
    """Split ``file.py:arg`` into the file and the argument, None where there is none."""
    text = os.fspath(recipe)
    file, mark, arg = text.partition(".py:")
    return (f"{file}.py", arg) if mark else (text, None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the known name nearest to this one, or nothing."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _load_module(file: str) -> types.ModuleType:
    """Import a recipe by its path; raises MMJaxError with the recipes that stand there."""
    if not os.path.isfile(file):
        folder, name = os.path.split(file)
        name, home = name.partition(":")[0], "configs"
        if not folder and os.path.isdir(home):
            there = [os.path.join(home, f) for f in _recipes(home)]
            hint = nearest(os.path.join(home, name.removesuffix(".py") + ".py"), there)
            raise MMJaxError(f"no recipe {file}{hint} (there are {', '.join(there)})")
        folder = folder or "."
        if not os.path.isdir(folder):
            raise MMJaxError(f"no recipe {file}: there is no folder {folder} in {os.getcwd()}")
        there = _recipes(folder)
        hint = nearest(name, there) or nearest(name + ".py", there)
        listing = f" (there are {', '.join(there)})" if there else ""
        raise MMJaxError(f"no recipe {file}{hint}{listing}")
    name = "mmjax_recipe_" + os.path.basename(file).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise MMJaxError(f"{file} is no Python file; a recipe ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _recipes(folder: str) -> list[str]:
    """List the files of a folder that may be recipes."""
    return sorted(f for f in os.listdir(folder) if f.endswith(".py") and f[0] != "_")


def _override(config: Any, item: str) -> tuple[str, str]:
    """Split one override into path and text, checking that the path exists."""
    name, mark, text = item.lstrip("-").removeprefix("config.").partition("=")
    if not mark:
        text = "True"
    at, done = config, "config"
    for part in name.split("."):
        indexed = isinstance(at, list | tuple) and part.isdigit() and int(part) < len(at)
        if indexed:
            at = at[int(part)]
        elif _is_mapping(at) and part in at:
            at = at[part]
        else:
            known = list(at.keys()) if _is_mapping(at) else []
            what = f"{done} has: {', '.join(map(str, known))}" if known else f"{done} has no fields"
            raise MMJaxError(f"unknown config key {name!r}{nearest(part, known)} ({what})")
        done += f".{part}"
    if _is_mapping(at) and not text.strip().startswith("{"):
        raise MMJaxError(
            f"{done} is a group of settings ({', '.join(map(str, at.keys()))}); "
            f"set one of them: --{done}.{next(iter(at.keys()), 'key')}=..."
        )
    return name, text


def _set(config: Any, name: str, text: str) -> None:
    """Set one checked path from text, as ml_collections' config flags parse it."""
    from absl import flags
    from ml_collections import config_flags
    from ml_collections.config_flags import config_path

    name = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", name)  # ml_collections writes an index in brackets
    old = config_path.get_value(name, config)
    if old is None or text.lower() == "none":
        value = None if text.lower() == "none" else _literal(text)
        with config.ignore_type():
            config_path.set_value(name, config, value)
        return
    flag_values = flags.FlagValues()
    argv = ["config", f"--config.{name}={text}"]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
        flag_values(argv)
        value = config_path.get_value(name, flag_values["config"].value)
        config_path.set_value(name, config, value)
    except IndexError as e:
        raise MMJaxError(
            f"config.{name}: one value of a list is not set alone; give the whole of it, "
            f"--config.{name.rpartition('[')[0]}='(...)'"
        ) from e
    except (flags.Error, ValueError, TypeError, SyntaxError) as e:
        raise MMJaxError(
            f"config.{name}={text}: expected {type(old).__name__} (now {old!r}), got {text!r}"
        ) from e


def _literal(text: str) -> Any:
    """Read a Python literal, true/false/none in any case, or else the bare string."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_mapping(value: Any) -> bool:
    """Tell a mapping, ConfigDict included (which is none of the standard ABCs)."""
    return isinstance(value, Mapping) or all(
        hasattr(value, name) for name in ("keys", "items", "to_dict")
    )


def _build(cls: type, config: Any, path: str, problems: list[str]) -> Any:
    """Make one dataclass; on any problem append to ``problems`` and return None."""
    if isinstance(config, cls):
        return config
    if not _is_mapping(config):
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
    except ValueError as e:  # a dataclass that checks itself in __post_init__
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
        if _is_mapping(value):
            inner = args[1] if args else Any
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
    inner = [mine for arg, mine in tries if dataclasses.is_dataclass(arg) and _is_mapping(value)]
    problems.extend(inner[0] if len(inner) == 1 else [_wrong(path, value, _name(hint))])
    return None


def _wrong(path: str, value: Any, expected: str) -> str:
    return f"{path}: expected {expected}, got {type(value).__name__} {value!r}"


def _name(hint: Any) -> str:
    """Write a type the way it stands in the source."""
    if typing.get_args(hint):
        return str(hint).replace("typing.", "").replace("collections.abc.", "")
    return getattr(hint, "__name__", str(hint))
