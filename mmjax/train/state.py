"""The state of a training run: born sharded, split into what is trained and what is frozen."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mmjax.nn import paths
from mmjax.train import matrices
from mmjax.types import MMJaxError, nearest

if TYPE_CHECKING:
    from mmjax.train.settings import RunSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one step changes. step: int32, steps done. params: the trained parameters alone."""

    step: jax.Array
    params: nnx.State
    opt: Any


_TABLE, _HEAD = "decoder.embed.embedding", "decoder.head.kernel"


def trainable_names(
    names: Sequence[str],
    freeze: Sequence[str],
    lora: bool,
    train: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> set[str]:
    """Return the names that are trained.

    freeze: glob patterns on dotted names, such as ``decoder.embed.*``, that are not trained. train:
    patterns that are, and nothing else is; without any, everything. lora: adapters are trained, and
    beside them only what ``train`` names. rows: patterns of tables of which some rows are trained,
    whatever ``train`` says. Raises MMJaxError for a pattern that matches nothing, for a table that
    ``rows`` names and ``freeze`` freezes, and when nothing is left.
    """
    for what, patterns in (("freeze", freeze), ("train", train), ("train_rows", rows)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                if _TABLE in names and fnmatch.fnmatchcase(_HEAD, pattern):
                    raise MMJaxError(
                        f"{what} pattern {pattern!r} matches no parameter: this model's head is "
                        f"its embedding table, {_TABLE} (tie_word_embeddings); take the pattern "
                        f"out of {what}, and name the table where it is meant"
                    )
                raise MMJaxError(
                    f"{what} pattern {pattern!r} matches no parameter; names look like "
                    f"{', '.join(list(names)[:4])}{nearest(pattern, names)}"
                )

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    everything = not lora and not train
    chosen = {
        name
        for name in names
        if not name.endswith(".kernel_scale")  # of a quantised kernel, which is frozen itself
        if everything
        or (lora and name.rsplit(".", 1)[-1] in ("lora_a", "lora_b"))
        or matches(name, (*train, *rows))
    }
    frozen = {name for name in chosen if matches(name, freeze)}
    if clash := sorted(name for name in frozen if matches(name, rows)):
        raise MMJaxError(
            f"train_rows trains rows of {', '.join(clash)}, which freeze matches; take it out of "
            "one of them"
        )
    if chosen <= frozen:
        raise MMJaxError("nothing is left to train: the freeze patterns match every parameter")
    return chosen - frozen


def chosen_by(settings: RunSettings, names: Sequence[str]) -> set[str]:
    """Return the names that a run trains; see ``trainable_names``."""
    tables = [one.params for one in settings.train_rows]
    return trainable_names(names, settings.freeze, settings.lora.rank > 0, settings.train, tables)


def split(model: nnx.Module, chosen: set[str]) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Split a model into its graph, its trained parameters and its frozen ones."""

    def trained(path, _):
        return ".".join(str(key) for key in path) in chosen

    return nnx.split(model, trained, ...)


def abstract_state(
    make_model: Callable[[], nnx.Module], chosen: set[str], tx, mesh
) -> tuple[nnx.GraphDef, TrainState, nnx.State]:
    """Return the graph and the abstract state (shapes, dtypes, shardings), nothing allocated."""
    return abstract_parts(nnx.eval_shape(make_model), chosen, tx, mesh)


def abstract_parts(
    model: nnx.Module, chosen: set[str], tx: optax.GradientTransformation, mesh
) -> tuple[nnx.GraphDef, TrainState, nnx.State]:
    """Return the same as ``abstract_state`` of an abstract model, what ``nnx.eval_shape`` makes."""
    graphdef, params, frozen = split(model, chosen)
    opt = jax.eval_shape(tx.init, params)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)

    places = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        spec = nnx.get_named_sharding(leaf, mesh).get_value().spec
        places[paths.name_of(path)] = (matrices.axes_of(leaf), leaf.shape, spec)

    def beside(path, leaf):
        """Place an optimizer's array where its parameter lies."""
        name = paths.name_of(path)
        own = name
        while own and own not in places:
            own = own.partition(".")[2]
        spec = matrices.state_spec(name, leaf.shape, *places[own]) if own else replicated.spec
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def with_sharding(tree):
        shardings = nnx.get_named_sharding(tree, mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=s if isinstance(s, jax.sharding.Sharding) else replicated
            ),
            tree,
            shardings,
        )

    return (
        graphdef,
        TrainState(step, with_sharding(params), jax.tree_util.tree_map_with_path(beside, opt)),
        with_sharding(frozen),
    )


def shardings(tree):
    """Return the sharding of every leaf of an abstract tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def init(
    make_model: Callable[[], nnx.Module], chosen: set[str], tx: optax.GradientTransformation, mesh
) -> tuple[nnx.GraphDef, TrainState, nnx.State]:
    """Build a randomly initialised state; every array is made where it belongs."""
    graphdef, abstract, frozen = abstract_state(make_model, chosen, tx, mesh)
    values = drawn(make_model, {**paths.flatten(abstract.params), **paths.flatten(frozen)})
    return graphdef, started(abstract, tx, values), filled(frozen, values)


def drawn(
    make_model: Callable[[], nnx.Module], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Draw some of a model's parameters alone, by name; XLA drops the rest from the program."""
    if not wanted:
        return {}

    def build():
        values = paths.flatten(nnx.state(make_model()))
        return {name: values[name].astype(x.dtype) for name, x in wanted.items()}

    return jax.jit(build, out_shardings={n: x.sharding for n, x in wanted.items()})()


def started(
    abstract: TrainState, tx: optax.GradientTransformation, values: Mapping[str, jax.Array]
) -> TrainState:
    """Return the state before the first step, its parameters from ``values`` by name."""
    params = filled(abstract.params, values)
    opt = jax.jit(tx.init, out_shardings=shardings(abstract.opt))(params)
    return TrainState(jax.device_put(jnp.int32(0), abstract.step.sharding), params, opt)


def filled(abstract: nnx.State, values: Mapping[str, jax.Array]) -> nnx.State:
    """Return an abstract tree's arrays, from ``values`` by name, where there may be others too."""
    return paths.replace(abstract, {name: values[name] for name in paths.flatten(abstract)})
