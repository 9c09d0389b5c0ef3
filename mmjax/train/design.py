"""What a run is made of, known and checked before anything is allocated: names, rates, shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import optax
from flax import nnx

from mmjax.models.api import Config, Processor
from mmjax.nn import paths
from mmjax.parallel.sharding import batch_sharding, check_divides
from mmjax.train import frozen as frozen_part
from mmjax.train import optim, startup, tuning, vocabulary
from mmjax.train import rows as trained_rows
from mmjax.train import state as train_state
from mmjax.train.build import Blueprint, blueprint, check_fresh
from mmjax.train.dropout import dropout_line, with_dropout
from mmjax.train.settings import RunSettings
from mmjax.train.state import TrainState
from mmjax.types import MMJaxError


@dataclasses.dataclass(frozen=True)
class Outline:
    """What of a model is trained, by which optimizer, and where all of it will lie on a mesh.

    chosen: names of the trained parameters. own_rates: those of each pattern of ``optim.rates``.
    state, frozen: abstract, the frozen parameters in the dtypes that they are kept in.
    """

    chosen: set[str]
    own_rates: dict[str, list[str]]
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    graphdef: nnx.GraphDef
    state: TrainState
    frozen: nnx.State


@dataclasses.dataclass(frozen=True)
class Design:
    """A whole run. rows: trained rows of tables. told: lines for the table at the start.

    settings: with a peer's tuning config written out.
    """

    settings: RunSettings
    plan: Blueprint
    outline: Outline
    rows: dict[str, trained_rows.Rows]
    told: dict[str, str]


def make_outline(
    settings: RunSettings, make: Callable[[], nnx.Module], mesh: jax.sharding.Mesh
) -> Outline:
    """Choose what is trained of the model that ``make`` makes; see ``Outline``.

    Raises MMJaxError for patterns that match nothing and for rates that cannot work.
    """
    model = nnx.eval_shape(make)
    names = list(paths.flatten(nnx.state(model)))
    chosen = train_state.chosen_by(settings, names)
    optim.check_decay(settings.optim, names)
    own_rates = optim.by_rate(settings.optim, chosen)
    tx = optim.make_optimizer(settings.optim, settings.steps)
    schedule = optim.schedule(settings.optim, settings.steps)
    graphdef, state, frozen = train_state.abstract_parts(model, chosen, tx, mesh)
    frozen = frozen_part.cast_abstract(frozen, settings.model.frozen_dtype)
    return Outline(chosen, own_rates, tx, schedule, graphdef, state, frozen)


def make_design(settings: RunSettings, mesh: jax.sharding.Mesh) -> Design:
    """Read configs and tokenizer, and check that the settings fit the model and the mesh.

    Raises MMJaxError for what does not, before a weight is read.
    """
    settings, told = tuning.applied(settings)
    choose = partial(train_state.chosen_by, settings)
    plan = blueprint(settings.model, settings.lora, settings.seed, choose)
    check_positions(plan.config, settings.data.seq_len)
    outline = make_outline(settings, plan.make, mesh)
    params = outline.state.params
    check_divides(paths.flatten(params) | paths.flatten(outline.frozen))
    vocabulary.check_new_tokens(
        plan.new_rows, plan.processor, (params, outline.frozen), outline.chosen
    )
    told |= check_fresh(plan, outline.chosen)
    told |= dropout_line(with_dropout(plan.config, settings.model))
    rows = trained_rows.resolve(settings.train_rows, params, plan.processor, plan.new_rows)
    told |= startup.rate_lines(outline.own_rates, settings.optim, params)
    told |= trained_rows.describe(rows, plan.processor)
    told |= vocabulary.growth_line(plan.source_rows, plan.config.vocab_size)
    return Design(settings, plan, outline, rows, told)


def check_positions(config: Config, seq_len: int) -> None:
    """Raise MMJaxError where a sample may be longer than the model's table of positions."""
    limit = config.decoder.longest
    if limit is not None and seq_len > limit:
        raise MMJaxError(
            f"data.seq_len is {seq_len}, and the model's table has positions for {limit} tokens: "
            f"all behind them would take the last; set data.seq_len to {limit} or less (more rows, "
            "data.batch_size, hold as many tokens)"
        )


def abstract_batch(
    settings: RunSettings, processor: Processor, rows: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of so many rows, and where it lies; see ``Batch``."""
    data = settings.data
    length, patches = (rows, data.seq_len), (rows, data.max_patches, processor.patch_dim)
    shapes = dict.fromkeys(("tokens", "positions", "visual_index", "segment_ids"), length)
    shapes |= {"target_index": (rows, data.max_targets), "patches": patches}
    return {
        name: jax.ShapeDtypeStruct(
            shape,
            np.uint8 if name == "patches" else np.int32,
            sharding=batch_sharding(mesh, name),
        )
        for name, shape in shapes.items()
    }
