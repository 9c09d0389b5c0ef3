"""An opened pretrained model: what it is, whether it holds all of a model, and its parameters."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmjax.models import registry
from mmjax.models.views import Canonical, Merged, is_lora
from mmjax.nn import paths
from mmjax.nn.linear import DTypes, LoRA
from mmjax.types import MMJaxError
from mmjax.weights import rules as R
from mmjax.weights.load import Each, Reading, load_params
from mmjax.weights.reader import Reader

_LAYER = re.escape("{l}")
_ROWS = 4096  # of a table that are compared at a time


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published or converted model that was opened and told apart; its numbers are on disk.

    kind: ``mmjax``, ``hub``, ``transformers5``, ``megatron`` or ``peft``. hf_config: config.json as
    it stands, or the sizes read off the tensors. config: the family's own. reader: tensors in the
    names that ``rules`` speak. lora: the adapters it holds, None without.
    fresh: glob patterns of the parameters that it lacks because nobody has trained them yet, or
    that shall not be read. rows: of its tables of the vocabulary, where ``config`` has more for
    tokens that are new; else None.
    folders: where its companion files lie, the nearest first. options: of the processor, where its
    files do not tell them. trained: glob patterns of what was trained whole beside ``lora``, as far
    as the folder notes it. template: the name of the one that its run asked in, noted likewise.
    """

    path: Path
    kind: str
    family: registry.Family
    hf_config: dict[str, Any]
    config: Any
    reader: Reader
    rules: tuple[R.Rule, ...]
    ignore: tuple[str, ...]
    lora: LoRA | None
    folders: tuple[Path, ...]
    fresh: tuple[str, ...] = ()
    rows: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained: tuple[str, ...] = ()
    template: str | None = None


def check(opened: Pretrained, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, R.Shape]:
    """Return the shapes of a model; raises MMJaxError unless an opened one holds all of it."""
    require_trained(opened)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    R.check(opened.rules, shapes, opened.reader, opened.ignore)
    return shapes


def require_trained(opened: Pretrained) -> None:
    """Raise MMJaxError for a model a part of which nobody has trained."""
    if opened.fresh:
        raise MMJaxError(
            f"{opened.path}: nothing holds {', '.join(opened.fresh)}, which would be random "
            "numbers; give the file that does, or train it first (train.py with model.parts)"
        )


def refuse_own_head(opened: Pretrained) -> None:
    """Raise MMJaxError where a model's head is its embedding and its files hold another head.

    transformers 5 keeps the two apart then, whatever config.json says; 4 let the embedding be both.
    """
    if not opened.config.decoder.tied:
        return
    reader, there = opened.reader, set(opened.reader.keys())
    embed = next(rule.theirs for rule in opened.rules if rule.ours == "decoder.embed.embedding")
    for key in sorted(key for key in there if key.endswith("lm_head.weight")):
        if embed not in there or reader.shape(key) != reader.shape(embed):
            continue
        for start in range(0, reader.shape(key)[0], _ROWS):
            rows = slice(start, start + _ROWS)
            if not np.array_equal(reader.read(key, rows), reader.read(embed, rows)):
                raise MMJaxError(
                    f"{opened.path}: config.json says tie_word_embeddings, and {key} is another "
                    f"table than {embed}: transformers 5 runs both, 4 the embedding alone. Set "
                    "tie_word_embeddings to false to keep the head, or remove its tensor"
                )


def abstract_params(
    family: registry.Family, config: Any, *, lora: LoRA | None = None, dtype: str = "float32"
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter by dotted name; call inside a mesh."""

    def make():
        return nnx.state(
            family.Model(config, rngs=nnx.Rngs(0), dtypes=DTypes(param=dtype), lora=lora), nnx.Param
        )

    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in paths.flatten(nnx.eval_shape(make)).items()
    }


def read_params(
    opened: Pretrained,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    only: Collection[str] | None = None,
    progress: Reading | None = None,
    each: Each | None = None,
) -> dict[str, jax.Array]:
    """Load a model's parameters in the dtypes and onto the shardings of ``abstract``.

    only, progress, each: as for ``load_params``. LoRA leaves that it does not have, and what
    ``fresh`` names, are left out of the result: they start from their own initial values. Raises
    WeightsMismatch when keys or shapes differ otherwise.
    """
    have = {rule.ours for rule in opened.rules} if opened.lora else set()
    fresh = {n for pattern in opened.fresh for n in fnmatch.filter(abstract, pattern)}
    wanted = {
        name: leaf
        for name, leaf in abstract.items()
        if name not in fresh and (name in have or not is_lora(name))
    }
    unread = [
        re.escape(rule.theirs)
        for rule in opened.rules
        if any(fnmatch.fnmatchcase(rule.ours, pattern) for pattern in opened.fresh)
    ]
    ignore = (*opened.ignore, *(f"^{key.replace(_LAYER, '[0-9]+')}$" for key in unread))
    return load_params(
        opened.reader, opened.rules, wanted, only=only, ignore=ignore, progress=progress, each=each
    )


def merged(opened: Pretrained) -> Pretrained:
    """Return a model whose adapters are added to its kernels, piece by piece as it is read.

    Raises MMJaxError when it has none. Call inside a mesh.
    """
    if opened.lora is None:
        raise MMJaxError(f"{opened.path}: holds no adapters to merge")
    shapes = check(opened, abstract_params(opened.family, opened.config, lora=opened.lora))
    reader = Merged(Canonical(opened.reader, opened.rules, shapes), opened.lora)
    same = tuple(R.Rule(key, key) for key in reader.keys())  # noqa: SIM118
    return dataclasses.replace(opened, reader=reader, rules=same, ignore=(), lora=None)
