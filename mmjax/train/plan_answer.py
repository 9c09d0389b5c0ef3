"""What the model of a run needs to answer, once it is exported; nothing is allocated."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from mmjax.models import registry
from mmjax.models.api import Config
from mmjax.nn.linear import DTypes
from mmjax.parallel.mesh import use

DTYPE = "bfloat16"  # of weights and computation on accelerators, as ``mmjax.load`` takes it


@dataclasses.dataclass(frozen=True)
class AnswerPlan:
    """Bytes over all devices.

    weights: in bfloat16; quantised: as ``mmjax.load(weights="int8")`` keeps them. row: keys and
    values of ``tokens`` tokens, those of prompt and answer together.
    """

    weights: int
    quantised: int
    row: int
    tokens: int


def plan_answers(family: str, config: Config, tokens: int) -> AnswerPlan:
    """Count what a model of this config needs to answer, adapters merged; ``tokens`` of a row."""

    def model(kernel: str | None) -> nnx.Module:
        dtypes = DTypes(DTYPE, DTYPE, kernel=kernel)
        make = registry.family(family).Model
        return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0), dtypes=dtypes))

    with use():
        plain, rounded = model(None), model("int8")
        cache = jax.eval_shape(lambda: plain.init_cache(1, tokens))
    weights, quantised = (_bytes(nnx.state(one, nnx.Param)) for one in (plain, rounded))
    return AnswerPlan(weights, quantised, _bytes(cache), tokens)


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
