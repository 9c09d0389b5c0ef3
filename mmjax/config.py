"""Recipes: the one place of the library that sees a ConfigDict.

A recipe is a Python file with ``get_config(arg=None) -> ConfigDict``. ``resolve_recipe`` loads it
and applies overrides as the command line does; ``mmjax.schema`` makes typed settings of it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax.home import in_home
from mmjax.schema import is_mapping, to_dataclass
from mmjax.types import MMJaxError, nearest

_PEERS = {
    "model_name_or_path": "model.init",
    "pretrained_model_name_or_path": "model.init",
    "vision_tower": "model.parts",
    "data_path": "data.sources",
    "per_device_train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "max_grad_norm": "optim.clip_norm",
    "num_train_epochs": "steps",
    "num_epochs": "steps",
    "max_steps": "steps",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "precision": "model.dtype",
    "gradient_checkpointing": "model.remat",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "model_max_length": "data.seq_len",
    "dataloader_num_workers": "data.workers",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "log.every",
    "eval_steps": "eval.every",
    "report_to": "log.wandb",
}
"""Arguments of transformers' Trainer and of the peers' scripts, and the setting to look at here."""


def of_a_peer(name: str) -> str | None:
    """Return the setting for what the PyTorch peers call ``learning_rate``; None for no such."""
    return _PEERS.get(name.replace("-", "_"))


class OpenDict(ConfigDict):
    """A group whose names are the user's, such as ``mesh``: an override may bring new ones."""


class Group(ConfigDict):
    """A group of settings: their names are given, and a dict for an open one stays open.

    A value of another kind than the one before is left to ``to_dataclass``: some settings are of
    several, such as ``data.template``, and it tells those that are wrong by their whole names.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(self.get(name), OpenDict) and isinstance(value, Mapping | ConfigDict):
            value = _opened(value)
        try:
            super().__setitem__(name, value)
        except TypeError:
            with self.ignore_type():
                super().__setitem__(name, _opened(value))


def fill(cls: type, values: Mapping[str, Any]) -> ConfigDict:
    """Return a ConfigDict with every setting of a dataclass, ``values`` laid over the defaults.

    A recipe names what it chooses; filled, any other setting can be overridden on the command line
    too, and settings that are mappings can be added to. Raises MMJaxError as ``to_dataclass`` does.
    """
    made = to_dataclass(cls, values)
    return _group(made, dataclasses.asdict(made))


def _group(made: Any, plain: Mapping[str, Any]) -> ConfigDict:
    """Turn ``plain``, a dataclass as dicts, into groups: fixed ones where it is a dataclass.

    One that may also be None is given as a whole, so its group is open.
    """
    hints = typing.get_type_hints(type(made))
    return Group(
        {
            name: _group(getattr(made, name), value)
            if dataclasses.is_dataclass(hints[name])
            else _opened(value)
            for name, value in plain.items()
        }
    )


def _opened(value: Any) -> Any:
    if not isinstance(value, Mapping | ConfigDict):
        return value
    return OpenDict({name: _opened(inner) for name, inner in value.items()})


def resolve_recipe(recipe: str | os.PathLike, overrides: Iterable[str] = ()) -> Any:
    """Load ``configs/x.py`` or ``configs/x.py:arg`` and return its locked ConfigDict.

    overrides: ``optim.lr=3e-5``, also with the ``--config.`` of the command line in front. The home
    folder is written out in every text, ``path="~/data.jsonl"``.
    Raises MMJaxError for a missing file, an argument the recipe does not take, an unknown key (in
    the file too, with its line) or a value of the wrong type, with the nearest name.
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
    except AttributeError as e:
        if not isinstance(e.obj, ConfigDict):
            raise
        frames = traceback.extract_tb(e.__traceback__)
        line = [f for f in frames if "ml_collections" not in f.filename][-1]
        raise MMJaxError(
            f"{line.filename}:{line.lineno}: {line.line}: there is no setting "
            f"{e.name!r}{nearest(e.name, e.obj)} (there are {', '.join(map(str, e.obj))})"
        ) from e
    if not isinstance(config, ConfigDict):
        raise MMJaxError(
            f"{file}: get_config returns {type(config).__name__}, no ConfigDict: it ends with "
            "return config"
        )
    config.lock()
    config = apply_overrides(config, overrides)
    _write_home(config)
    return config


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
    for item in overrides:
        _set(config, *_override(config, item))
    return config


def split_recipe(recipe: str | os.PathLike) -> tuple[str, str | None]:
    """Split ``file.py:arg`` into the file and the argument, None where there is none."""
    text = os.fspath(recipe)
    file, mark, arg = text.partition(".py:")
    return (f"{file}.py", arg) if mark else (text, None)


def folder_of_runs(recipe: str | os.PathLike) -> str:
    """Return where a recipe's run lives if nobody says: ``runs/x`` of ``configs/x.py``.

    An argument is part of the name, ``runs/x-quick``, with ``_`` for what file names rarely hold.
    """
    file, arg = split_recipe(recipe)
    name = os.path.basename(file).removesuffix(".py") + (f"-{arg}" if arg else "")
    return os.path.join("runs", re.sub(r"[^\w.,=-]", "_", name))


def _write_home(config: Any) -> None:
    """Write the home folder out in all texts of a ConfigDict."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _write_home(value)
        elif (written := in_home(value)) != value:
            config[name] = written


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
    parts = name.split(".")
    for i, part in enumerate(parts):
        indexed = isinstance(at, list | tuple) and part.isdigit() and int(part) < len(at)
        if indexed:
            at = at[int(part)]
        elif is_mapping(at) and part in at:
            at = at[part]
        elif _grows(at) and i == len(parts) - 1 and not _slip(part, at):
            return name, text
        else:
            known = list(at.keys()) if is_mapping(at) else []
            what = f"{done} has: {', '.join(map(str, known))}" if known else f"{done} has no fields"
            raise MMJaxError(f"unknown config key {name!r}{_meant(config, part, known)} ({what})")
        done += f".{part}"
    whole = text.strip().startswith("{") and not isinstance(at, Group)
    if is_mapping(at) and not _grows(at) and not whole:
        raise MMJaxError(
            f"{done} is a group of settings ({', '.join(map(str, at.keys()))}); "
            f"set one of them: --{done}.{next(iter(at.keys()), 'key')}=..."
        )
    if not mark and not isinstance(at, bool):
        raise MMJaxError(f"{done} is given no value (now {at!r}); write --{done}=VALUE")
    return name, text


def _meant(config: Any, name: str, known: list[Any]) -> str:
    """Return the hint for an unknown name: a peer's, one of another group, or the nearest."""
    elsewhere = [s for s in _settings(config) if s.rpartition(".")[2] == name]
    if peer := of_a_peer(name):
        elsewhere = [peer]
    if not elsewhere:
        return nearest(name, known)
    return f"; did you mean {' or '.join(map(repr, elsewhere))}?"


def _settings(group: Any, prefix: str = "") -> Iterable[str]:
    """Give the whole name of every setting, down to groups whose names are the user's."""
    for name, value in group.items():
        yield prefix + name
        if isinstance(value, ConfigDict) and not _grows(value):
            yield from _settings(value, f"{prefix}{name}.")


def _parent(config: Any, name: str) -> tuple[Any, str]:
    """Return the group that a path leads into, and its last name."""
    *path, last = name.split(".")
    for part in path:
        config = config[int(part)] if isinstance(config, list | tuple) else config[part]
    return config, last


def _grows(group: Any) -> bool:
    """Tell whether names may be added to a group; groups in a list are plain dicts."""
    return isinstance(group, OpenDict) or type(group) is dict


def _slip(name: str, known: Iterable[str]) -> bool:
    """Tell a slip of the pen from a new name: ``hidden_sise`` beside ``hidden_size``."""

    def bare(x: str) -> str:  # more of a kind are often numbered: train, train2
        return re.sub(r"\d", "", x)

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    return bool(near) and bare(near[0]) != bare(name)


def _set(config: Any, name: str, text: str) -> None:
    """Set one checked path from text, as ml_collections' config flags parse it.

    What they have no word for is taken as a literal, for ``to_dataclass`` to check: a new name, and
    a mapping where another kind of value stands, or the other way round.
    """
    from absl import flags
    from ml_collections import config_flags
    from ml_collections.config_flags import config_path

    group, last = _parent(config, name)
    value = _literal(text)
    if not isinstance(group, list | tuple):
        old = group[last] if last in group else OpenDict()
        if _grows(old) or (isinstance(value, dict) and not is_mapping(old)):
            with config.unlocked(), config.ignore_type():
                group[last] = _opened(value)
            return
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
