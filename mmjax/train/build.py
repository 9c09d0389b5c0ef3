"""From settings to the parts of a run: model, processor, weights, data."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mmjax.data.catalog import make_sources
from mmjax.data.examples import LoadExample, RecordOptions, make_loader
from mmjax.data.mixture import Mixture
from mmjax.data.packing import BatchShape
from mmjax.data.pipeline import TrainIterator, make_train_iterator
from mmjax.data.streams import Streams, share_streams
from mmjax.data.survey import fingerprint, require_some_good
from mmjax.loading import first_processor
from mmjax.models import opening, pretrained, registry
from mmjax.models.api import Config, Processor
from mmjax.models.companions import stated_ends, stated_generation
from mmjax.models.parts import split_chain
from mmjax.models.processor import follow
from mmjax.models.stated_sizes import with_values
from mmjax.models.views import is_lora
from mmjax.nn import paths, quantized
from mmjax.nn.linear import DTypes, LoRA
from mmjax.nn.stack import REMAT
from mmjax.ops import implementations
from mmjax.ops.attention import IMPLEMENTATIONS
from mmjax.parallel import distributed
from mmjax.parallel.sharding import process_rows, row_owners
from mmjax.train import adapters, vocabulary
from mmjax.train import frozen as frozen_part
from mmjax.train.dropout import with_dropout
from mmjax.train.settings import DataSettings, LoRASettings, ModelSettings, RunSettings
from mmjax.types import MMJaxError, nearest


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model that has not been allocated: everything known before a device is touched.

    source: the opened folder its weights will be read from, or None for a random start.
    lora_init: where its adapters start, or None for fresh ones or those of ``source``. new_rows: of
    the vocabulary, those of tokens that the run adds. source_rows: how many ``source`` has, where
    the vocabulary grows; None where it does not. ends, generation: of ``source``, see
    ``LoadedModel``.
    """

    family: str
    config: Config
    processor: Processor
    source: pretrained.Pretrained | None
    make: Callable[[], nnx.Module]
    lora: LoRA | None = None
    lora_init: str | None = None
    new_rows: tuple[int, ...] = ()
    source_rows: int | None = None
    ends: tuple[int, ...] = ()
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def names(self) -> list[str]:
        """Dotted names of all parameters."""
        return list(paths.flatten(nnx.state(nnx.eval_shape(self.make))))


Chosen = Callable[[Sequence[str]], set[str]]
"""Tells which of all parameters, by name, are trained."""


def blueprint(
    settings: ModelSettings, lora: LoRASettings, seed: int, chosen: Chosen = lambda names: set()
) -> Blueprint:
    """Read configs and tokenizer, and check that they fit; allocates nothing.

    chosen: what is trained, nothing by default; only asked where frozen kernels are quantised.
    """
    family = registry.family(settings.family)
    source = open_init(settings)
    if source is not None:
        hf = with_values(source.hf_config, settings.config)
        processor = first_processor(family, source)
    else:
        if not settings.words:
            raise MMJaxError(
                "a model that starts from random weights needs model.words for its tokenizer; "
                "give them, or set model.init to a model folder"
            )
        draft = family.Config.from_hf(settings.config)
        processor = family.Processor.for_words(settings.words, draft)
        hf = {**settings.config, **processor.token_ids()}
    config, had = family.Config.from_hf(hf), len(processor.tokenizer or ())
    _check_keys(settings.config, config, source.hf_config if source else {})
    rows = config.vocab_size
    if source is not None and source.rows is not None:  # it lacks those of the family's own tokens
        rows, had = source.rows, min(had, source.rows)
    processor = processor.with_options(**settings.processor)
    config, new = vocabulary.with_tokens(config, processor, hf, had)
    stated = {k: x for k, x in settings.processor.items() if k not in settings.config}
    config = follow(config, processor, stated)
    processor.check(config)
    make, adapter = maker(settings, lora, config, seed, chosen)
    if source is not None and source.lora is not None:
        adapters.check_continues(source.lora, adapter, f"model.init {settings.init}")
    folders = () if source is None else source.folders
    return Blueprint(
        settings.family, config, processor, source, make, adapter, lora.init, new,
        rows if source is not None and rows < config.vocab_size else None,
        stated_ends(folders, config.vocab_size), stated_generation(folders),
    )  # fmt: skip


def _check_keys(given: Mapping[str, Any], config: Config, stated: Mapping[str, Any]) -> None:
    """Raise MMJaxError for a key of ``model.config`` that is nearly one which a model has.

    What else nothing reads passes, as in a published config.json. stated: that of ``model.init``.
    """
    known = {*config.to_hf(), *stated}
    for key in given:
        near = difflib.get_close_matches(key, known - set(given), 1, cutoff=0.9)
        if key not in known and near:
            raise MMJaxError(f"model.config has {key!r}, which nothing reads: is it {near[0]!r}?")


def check_fresh(plan: Blueprint, chosen: set[str]) -> dict[str, str]:
    """Return a line that tells which parts start from initial values.

    Raises MMJaxError where nothing of such a part is trained: it would stay random.
    """
    fresh = () if plan.source is None else plan.source.fresh
    for pattern in fresh:
        if not any(fnmatch.fnmatchcase(n, pattern) and not is_lora(n) for n in chosen):
            raise MMJaxError(
                f"{pattern} starts from random numbers, as model.parts lack it or model.fresh "
                f"names it, and none of it is trained; train it, train=({pattern!r},), or begin "
                "with a model that has it"
            )
    return {"fresh": f"{', '.join(fresh)} start from initial values"} if fresh else {}


def absent_files(settings: ModelSettings) -> list[str]:
    """Return those of ``model.init`` and ``model.parts`` that are not there, with their names."""
    files = {"model.init": settings.init}
    files |= {f"model.parts {k}": v for k, v in settings.parts.items() if k != "vision_config"}
    return [f"{name} ({x})" for name, x in files.items() if x and not _exists(x)]


def _exists(path: str) -> bool:
    return all(one.exists() for one in split_chain(path))


def open_init(settings: ModelSettings) -> pretrained.Pretrained | None:
    """Open what a run starts from; None where that is random weights alone."""
    if not settings.init:
        if not settings.parts:
            return None
        family = registry.family(settings.family)
        source = opening.open_parts(family, settings.config, **settings.parts)
    else:
        source = opening.open_pretrained(settings.init, **settings.parts)
        if source.family.name != settings.family:
            raise MMJaxError(
                f"model.init {settings.init} holds a {source.family.name!r} model and "
                f"model.family is {settings.family!r}"
            )
    return dataclasses.replace(source, fresh=(*source.fresh, *settings.fresh))


def maker(
    settings: ModelSettings,
    lora: LoRASettings,
    config: Config,
    seed: int,
    chosen: Chosen = lambda names: set(),
) -> tuple[Callable[[], nnx.Module], LoRA | None]:
    """Return the function that makes the model of a config, and the adapters it gets."""
    family = registry.family(settings.family)
    floats = dict.fromkeys(("dtype", "param_dtype"), frozen_part.FLOATS)
    choices = dict(remat=REMAT, attention=IMPLEMENTATIONS, frozen_dtype=frozen_part.KINDS)
    for key, known in (choices | floats).items():
        if (name := getattr(settings, key)) not in known:
            near = nearest(name, known)
            raise MMJaxError(f"model.{key} is {name!r}{near}; choose one of {', '.join(known)}")
    if settings.scan_unroll < 1:
        raise MMJaxError(f"model.scan_unroll is {settings.scan_unroll}; it must be 1 or more")
    check_attention(settings)
    config = with_dropout(config, settings)

    def make(dtypes: DTypes, adapter: LoRA | None = None) -> nnx.Module:
        names = ("remat", "scan_unroll", "attention")
        run = {name: getattr(settings, name) for name in names}
        return family.Model(config, rngs=nnx.Rngs(seed), dtypes=dtypes, lora=adapter, **run)

    def names_of(made: Callable[[], nnx.Module]) -> list[str]:
        return list(paths.flatten(nnx.state(nnx.eval_shape(made))))

    dtypes, adapter = DTypes(settings.param_dtype, settings.dtype), None
    if lora.rank or lora.init:
        maps = adapters.linear_maps(names_of(partial(make, dtypes)))
        adapter = adapters.make_lora(lora, maps)
    if (kind := settings.frozen_dtype) in quantized.KINDS:
        names = names_of(partial(make, dtypes, adapter))
        maps = frozen_part.quantized_maps(names, chosen(names), kind, settings.quantize)
        dtypes = dataclasses.replace(dtypes, kernel=kind, maps=maps)
    return partial(make, dtypes, adapter), adapter


def check_attention(settings: ModelSettings, ranges: bool = False) -> None:
    """Raise MMJaxError where ``model.attention`` can do nothing on this machine.

    ranges: or where it cannot do what a decoder asks for in training: rows tell which of their
    tokens are one sample, so queries have ranges of keys.
    """
    if problem := implementations.own_problem(settings.attention, settings.dtype, ranges):
        raise MMJaxError(
            f'model.attention is "{settings.attention}": {problem}; "auto" takes what works'
        )


def train_loader(settings: RunSettings, processor: Processor) -> LoadExample:
    """Open the sources of a run, and return what makes examples of their records.

    Raises MMJaxError for a source, weight or template that is wrong; nothing is allocated.
    """
    data = settings.data
    if not data.sources:
        raise MMJaxError("data.sources is empty: name at least one source to train on")
    mixture = Mixture.of(make_sources(data.sources), data.weights, data.counts)
    shape = BatchShape(data.batch_size, data.seq_len, data.max_patches, data.max_targets)
    options = RecordOptions(**record_options(data))
    return make_loader(mixture, data.template, processor, shape, settings.seed, options)


def record_options(data: DataSettings) -> dict[str, Any]:
    """Return what a run does with a record: the settings that ``RecordOptions`` takes."""
    fields = (field.name for field in dataclasses.fields(RecordOptions))
    return {name: getattr(data, name) for name in fields}


def train_iterator(settings: RunSettings, processor: Processor, workdir: Path) -> Streams:
    """Build this process's training batches, once all processes see the same config and data."""
    data = settings.data
    load = train_loader(settings, processor)
    mixture = load.mixture
    rows = process_rows(jax.sharding.get_mesh(), data.batch_size)
    mine, count = share_streams(rows, data.batch_size, data.streams)
    lengths = dict(zip(mixture.names, map(len, mixture.sources), strict=True))
    contents = {}
    if jax.process_count() > 1:  # files of one length may still be of two versions
        contents = dict(zip(mixture.names, map(fingerprint, mixture.sources), strict=True))
    facts = distributed.facts_of(dataclasses.asdict(settings), lengths, contents)
    distributed.check_same({**facts, "--workdir": str(workdir.absolute())})
    distributed.check_shared(workdir, "--workdir")
    require_some_good(mixture, load)
    owners = row_owners(jax.sharding.get_mesh(), data.batch_size)[:: data.batch_size // count]
    made = {}
    for i in mine:  # of processes that share rows one writes the list of skipped records
        listed = workdir if owners[i] == jax.process_index() else None
        made[i] = _stream(i, count, mixture, settings, processor, listed)
    return Streams(made, count)


def _stream(
    number: int,
    count: int,
    mixture: Mixture,
    settings: RunSettings,
    processor: Processor,
    workdir: Path | None,
) -> TrainIterator:
    data = settings.data
    return make_train_iterator(
        mixture,
        data.template,
        processor,
        seq_len=data.seq_len,
        max_patches=data.max_patches,
        max_targets=data.max_targets,
        batch_size=data.batch_size // count,
        seed=settings.seed,
        pack=data.pack,
        group=data.group,
        process_index=number,
        process_count=count,
        num_workers=data.workers,
        max_bad_share=data.max_bad_share,
        workdir=workdir,
        **record_options(data),
    )
