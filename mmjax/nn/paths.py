"""Dotted names of parameters, such as ``decoder.layers.attn.q.kernel``: part of the API."""

from collections.abc import Callable, Collection
from typing import Any

import jax


def name_of(path: tuple[Any, ...]) -> str:
    """Return the dotted name of a jax key path through an ``nnx.State``."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    return ".".join(str(n) for n in names if n not in (None, "value"))


def flatten(state) -> dict[str, Any]:
    """Return {dotted name: array} of a state, in its order."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def map_named(fn: Callable[[str, Any], Any], state):
    """Map ``fn(name, leaf)`` over a state."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(name_of(path), leaf), state)


def replace(state, values: dict[str, Any]):
    """Return the state with every leaf taken from ``values`` by its name."""
    return map_named(lambda name, _: values[name], state)


def patterns(some: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """Write some of all names as globs: ``perceiver.*`` where all of a part is among them."""
    chosen, found = set(some), []
    for name in names:
        if name in chosen:
            part = name.split(".")[0]
            all_of_it = all(n in chosen for n in names if n.split(".")[0] == part)
            found.append(f"{part}.*" if all_of_it else name)
    return tuple(dict.fromkeys(found))
