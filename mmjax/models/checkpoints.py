"""Open a model in any layout, read its parameters, and write a folder of ours."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import mmjax
from mmjax.models import registry
from mmjax.models.adapter_files import (
    adapter_config,
    adapter_pairs,
    partial_adapter,
    peft_names,
    without_config,
)
from mmjax.models.companions import copy_companions
from mmjax.models.json_files import read_json
from mmjax.models.parts import Assembled, Parts, differing, split_chain
from mmjax.models.views import Canonical, Merged, Subset, is_lora
from mmjax.nn import paths
from mmjax.nn.linear import DTypes, LoRA
from mmjax.parallel.mesh import use
from mmjax.types import MMJaxError
from mmjax.weights import peft
from mmjax.weights import rules as R
from mmjax.weights.load import Each, Progress, load_params
from mmjax.weights.reader import Overlay, Reader, Renamed, open_reader
from mmjax.weights.store import StoreReader, StoreWriter
from mmjax.weights.writer import Arrays, atomic_folder, refuse_incomplete

FORMAT = 1
_LAYER = re.escape("{l}")
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened and told apart; its numbers are still on disk.

    kind: ``mmjax``, ``hub``, ``transformers5``, ``megatron`` or ``peft``. hf_config: config.json as
    it stands, or the sizes read off the tensors. config: the family's own. reader: tensors in the
    names that ``rules`` speak. lora: the adapters it holds, None without.
    fresh: glob patterns of the parameters that it lacks because nobody has trained them yet, or
    that shall not be read. rows:
    of its tables of the vocabulary, where ``config`` has more for tokens that are new; else None.
    folders: where its companion files lie, the nearest first. options: of the processor, where its
    files do not tell them.
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


def open_checkpoint(
    path: str | Path, *, base: str | Path | None = None, **parts: str | Path | None
) -> Checkpoint:
    """Open a converted folder, a PyTorch checkpoint (folder or file) or a PEFT adapter.

    path: several files separated by commas are one checkpoint: of a tensor in more than one of
        them, the last counts.
    base: folder of the model an adapter belongs to; by default the local folder that its
        adapter_config.json names. Where the adapter's own config.json tells a whole model, this
        may be the language model alone, as ``lm`` is.
    parts: where the parts lie that the checkpoint leaves out; see ``Parts``.
    Raises MMJaxError for what is missing, half-written, damaged or of no known family.
    """
    given, chain = Parts.of(parts), split_chain(path)
    for one in chain:
        refuse_incomplete(one)
    folders = tuple(dict.fromkeys(p if p.is_dir() else p.parent for p in chain))
    hf = next((found for f in folders if (found := read_json(f, "config.json"))), {})
    path = chain[0]
    if len(chain) == 1 and path.is_dir() and ("mmjax" in hf or (path / PARAMS).is_dir()):
        if given.given():
            raise MMJaxError(
                f"{path}: a converted folder, which is whole; leave {_options(given)} away"
            )
        return _open_converted(path, hf)
    raw = [open_reader(one) for one in chain]
    keys = [key for reader in raw for key in reader.keys()]  # noqa: SIM118
    about = (folders[0] / "adapter_config.json").is_file()
    if any(about or key.startswith(peft.PREFIX) for key in keys if ".lora_A." in key):
        return _open_adapter(folders[0], Overlay(*raw), base, parts, hf)
    path = Path(",".join(map(str, chain)))
    try:
        family, layout = registry.detect(hf, keys)
    except MMJaxError:
        if not given.given() or registry.nearest_type(hf):
            raise
        # Beside a file of trained parts may lie the config.json of one of the others.
        (family, layout), hf = registry.detect({}, keys), {}
    return _assemble(path, family, layout, raw, hf, folders, given)


def open_parts(
    family: registry.Family, hf: Mapping[str, Any], **parts: str | Path | None
) -> Checkpoint:
    """Put a model together from published parts alone; what stands between them is ``fresh``.

    hf: what config.json shall say beside what the parts tell. Raises MMJaxError for a family that
    has no such parts, or lacks some of them.
    """
    given = Parts.of(parts)
    if not hasattr(family.weights, "assemble"):
        raise MMJaxError(f"a {family.name} model has no {_options(given)}; leave that away")
    layout = family.weights.LAYOUTS[0]
    where = Path(str(given.lm or given.vision))
    return _assemble(where, family, layout, [], dict(hf), (), given)


def _assemble(
    path: Path,
    family: registry.Family,
    layout: str,
    raw: Sequence[Reader],
    hf: dict[str, Any],
    folders: tuple[Path, ...],
    given: Parts,
) -> Checkpoint:
    """Let a family make a model of some files, and of the parts that they leave out."""
    readers = [Renamed(one, lambda key: family.weights.to_hub(key, layout)) for one in raw]
    assemble = getattr(family.weights, "assemble", None)
    if assemble is not None:
        made = assemble(readers, layout, hf, given)
    elif given.given():
        raise MMJaxError(
            f"{path}: a {family.name} model has no {_options(given)}; leave that away. To make "
            "another of such parts, train it: train.py takes them in model.parts"
        )
    else:
        reader = readers[0] if len(readers) == 1 else Overlay(*readers)
        made = Assembled(hf or family.weights.guess_config(reader), reader, layout)
    config = family.Config.from_hf(made.hf)
    opened = Checkpoint(
        path,
        layout,
        family,
        dict(made.hf),
        config,
        made.reader,
        tuple(family.weights.rules(config, made.layout)),
        tuple(family.weights.IGNORE),
        None,
        (*folders, *(f for f in made.folders if f not in folders)),
        made.fresh,
        made.rows,
        made.options,
    )
    if made.adapter is None:
        return opened
    pairs, rules, lora = _adapted(opened, made.reader, made.adapter)
    return dataclasses.replace(opened, reader=pairs, rules=(*opened.rules, *rules), lora=lora)


def _adapted(under: Checkpoint, reader: Reader, about: Mapping[str, Any]):
    """Return ``adapter_pairs`` of the adapters in a reader that belong to a model."""
    with use():
        abstract = abstract_params(under.family, under.config)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    return adapter_pairs(reader, about, under.family, under.rules, shapes)


def _options(given: Parts) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in given.given())


def _open_converted(path: Path, hf: dict[str, Any]) -> Checkpoint:
    about = hf.get("mmjax")
    if about is None:
        raise MMJaxError(
            f"{path}: holds {PARAMS}/ and no finished config.json: a half-written conversion; "
            "delete it and run the conversion again"
        )
    if about["format"] > FORMAT:
        raise MMJaxError(
            f"{path}: written in format {about['format']} by mmjax {about['version']}; this mmjax "
            f"{mmjax.__version__} reads up to {FORMAT}: upgrade it, or convert the model again"
        )
    family = registry.family(about["family"])
    reader = StoreReader(path / PARAMS)
    lora = about.get("lora")
    lora = LoRA(**{**lora, "targets": tuple(lora["targets"])}) if lora else None
    same = tuple(R.Rule(key, key) for key in reader.keys())  # noqa: SIM118
    config = family.Config.from_hf(hf)
    return Checkpoint(path, "mmjax", family, hf, config, reader, same, (), lora, (path,))


def _open_adapter(
    folder: Path,
    raw: Reader,
    base: str | Path | None,
    parts: Mapping[str, Any],
    hf: Mapping[str, Any],
) -> Checkpoint:
    about = adapter_config(folder)
    named = about.get("base_model_name_or_path")
    base = base or parts.get("lm") or (named if named and Path(named).is_dir() else None)
    if base is None:
        raise MMJaxError(
            f"{folder}: an adapter of {named or 'an unnamed model'}; give that model's folder "
            "with --base DIR (in Python base=...)"
        )
    for one in split_chain(base):
        refuse_incomplete(one)
    family = registry.named_by(hf)
    beside = family and partial_adapter(family)
    if family is None and (lost := without_config(folder)):
        raise MMJaxError(
            f"{folder}: holds {lost} beside its adapter, and no config.json, which tells the model "
            "they belong to; copy it there"
        )
    if "mmjax" in (read_json(base, "config.json") or {}):
        raise MMJaxError(
            f"--base {base}: the base of an adapter has to be a PyTorch checkpoint, and this one "
            "is converted; give what it was converted from"
        )
    if beside is None:
        under = open_checkpoint(base, **parts)
    else:
        under = _base_and_beside(folder, folder / beside.file, family, base, parts, hf)
    if under.lora is not None:
        raise MMJaxError(
            f"--base {base}: holds adapters itself; merge them first (convert_weights.merge)"
        )
    pairs, rules, lora = _adapted(under, peft_names(raw, under.family), about)
    return dataclasses.replace(
        under,
        path=folder,
        kind="peft",
        # Whole tensors in an adapter (modules_to_save, biases) replace the base's.
        reader=Overlay(under.reader, pairs),
        rules=(*under.rules, *rules),
        lora=lora,
        folders=(folder, *under.folders),
    )


def _base_and_beside(
    folder: Path,
    file: Path,
    family: registry.Family,
    base: str | Path,
    parts: Mapping[str, Any],
    hf: dict[str, Any],
) -> Checkpoint:
    """Return what lies under an adapter: its base, with the whole tensors saved beside it.

    base: a model of the family, or its language model alone. hf: the adapter's own config.json,
    which counts before the base's.
    """
    own, layout = read_json(base, "config.json") or {}, family.weights.LAYOUTS[0]
    whole = registry.named_by(own) is family
    if parts.get("lm") not in (None, *([] if whole else [base])):
        raise MMJaxError(f"{folder}: --base {base} and --lm {parts['lm']} are given; leave one")
    beside = []
    if file.is_file():
        strip = lambda key: key.removeprefix(peft.PREFIX)  # noqa: E731
        beside = [Renamed(open_reader(file), strip)]
    if not whole:
        if not beside:
            raise MMJaxError(
                f"{folder}: lacks {file.name}, which holds what was trained of a {family.name} "
                f"beside its language model; copy it there, or give with --base a whole "
                f"{family.name} model"
            )
        given = Parts.of({**parts, "lm": base})
        return _assemble(folder, family, layout, beside, hf, (folder,), given)
    if differ := differing({"model_type": None, **own}, hf):
        raise MMJaxError(f"{folder}: an adapter of another model than --base {base}: {differ}")
    raw = [open_reader(base), *beside]
    given = Parts.of({**parts, "lm": None})
    return _assemble(folder, family, layout, raw, {**own, **hf}, (folder, Path(base)), given)


def open_adapters(path: str | Path, family: registry.Family, config: Any) -> Checkpoint:
    """Open the adapters alone of a PEFT folder or of a converted folder that has some.

    family, config: of the model they stand beside; its own weights are not needed.
    """
    path = Path(path)
    hf = read_json(path, "config.json") or {}
    if path.is_dir() and ("mmjax" in hf or (path / PARAMS).is_dir()):
        found = _open_converted(path, hf)
        if found.lora is None:
            raise MMJaxError(f"{path}: holds no adapters")
        rules = tuple(rule for rule in found.rules if is_lora(rule.ours))
        reader = Subset(found.reader, [rule.theirs for rule in rules])
        return dataclasses.replace(found, reader=reader, rules=rules)
    refuse_incomplete(path)
    raw, folder = open_reader(path), path if path.is_dir() else path.parent
    table = tuple(family.weights.rules(config))
    alone = Checkpoint(path, "peft", family, {}, config, raw, table, (), None, (folder,))
    pairs, rules, lora = _adapted(alone, peft_names(raw, family), adapter_config(folder))
    return dataclasses.replace(alone, reader=pairs, rules=tuple(rules), lora=lora)


def merged(ckpt: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose adapters are added to its kernels, piece by piece as it is read.

    Raises MMJaxError when it has none. Call inside a mesh.
    """
    if ckpt.lora is None:
        raise MMJaxError(f"{ckpt.path}: holds no adapters to merge")
    shapes = check(ckpt, abstract_params(ckpt.family, ckpt.config, lora=ckpt.lora))
    reader = Merged(Canonical(ckpt.reader, ckpt.rules, shapes), ckpt.lora)
    same = tuple(R.Rule(key, key) for key in reader.keys())  # noqa: SIM118
    return dataclasses.replace(ckpt, reader=reader, rules=same, ignore=(), lora=None)


def check(ckpt: Checkpoint, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, R.Shape]:
    """Return the shapes of a model; raises MMJaxError unless a checkpoint holds all of it."""
    require_trained(ckpt)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    R.check(ckpt.rules, shapes, ckpt.reader, ckpt.ignore)
    return shapes


def require_trained(ckpt: Checkpoint) -> None:
    """Raise MMJaxError for a model a part of which nobody has trained."""
    if ckpt.fresh:
        raise MMJaxError(
            f"{ckpt.path}: nothing holds {', '.join(ckpt.fresh)}, which would be random numbers; "
            "give the file that does, or train it first (train.py with model.parts)"
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
    ckpt: Checkpoint,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    progress: Progress | None = None,
    each: Each | None = None,
) -> dict[str, jax.Array]:
    """Load a checkpoint's parameters in the dtypes and onto the shardings of ``abstract``.

    each: as for ``load_params``. LoRA leaves that the checkpoint does not have, and what ``fresh``
    names, are left out of the result: they start from their own initial values. Raises
    WeightsMismatch when keys or shapes differ otherwise.
    """
    have = {rule.ours for rule in ckpt.rules} if ckpt.lora else set()
    fresh = {n for pattern in ckpt.fresh for n in fnmatch.filter(abstract, pattern)}
    wanted = {
        name: leaf
        for name, leaf in abstract.items()
        if name not in fresh and (name in have or not is_lora(name))
    }
    unread = [
        re.escape(rule.theirs)
        for rule in ckpt.rules
        if any(fnmatch.fnmatchcase(rule.ours, pattern) for pattern in ckpt.fresh)
    ]
    ignore = (*ckpt.ignore, *(f"^{key.replace(_LAYER, '[0-9]+')}$" for key in unread))
    return load_params(ckpt.reader, ckpt.rules, wanted, ignore=ignore, progress=progress, each=each)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion is going to write: (shape, dtype, chunk) of each of our parameters."""

    arrays: dict[str, tuple[R.Shape, np.dtype, R.Shape]]

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d, _ in self.arrays.values())


def plan_conversion(
    ckpt: Checkpoint, abstract: Mapping[str, jax.ShapeDtypeStruct], dtype: str = "keep"
) -> Plan:
    """Check a checkpoint against the model and lay out the converted folder.

    dtype: ``bfloat16``, ``float32`` or ``keep``; LoRA leaves stay float32, they are trained.
    """
    shapes, arrays = check(ckpt, abstract), {}
    for name, rule in R.by_ours(ckpt.rules, shapes).items():
        kind = np.dtype(np.float32)
        if not is_lora(name):
            own = ckpt.reader.dtype(rule.keys(shapes[name])[0])
            kind = np.dtype(own if dtype == "keep" else dtype)
        arrays[name] = (shapes[name], kind, rule.chunk(shapes[name], kind.itemsize))
    return Plan(arrays)


def write_converted(
    ckpt: Checkpoint,
    plan: Plan,
    destination: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a converted folder, one piece of a parameter at a time; it appears whole or not."""
    with atomic_folder(destination, overwrite=overwrite) as folder:
        store = StoreWriter(folder / PARAMS, plan.arrays)
        for name, (shape, dtype, chunk) in plan.arrays.items():
            rule = R.by_ours(ckpt.rules, [name])[name]
            for index in R.grid(tuple(slice(0, n) for n in shape), chunk):
                block = R.read_piece(rule, ckpt.reader, shape, index, dtype)
                store.write(name, index, block)
                if progress is not None:
                    progress(block.nbytes)
        store.close()
        copy_companions(ckpt.folders, folder)
        _write_config(folder, ckpt.family, ckpt.config, ckpt.lora)


def save_model(
    destination: str | Path,
    params: Mapping[str, Any],
    *,
    family: registry.Family,
    config: Any,
    lora: LoRA | None = None,
    folders: Sequence[Path] = (),
    overwrite: bool = False,
) -> None:
    """Write parameters in memory, by dotted name, as a folder that ``mmjax.load`` reads.

    folders: where to copy tokenizer and processor files from; the first that has one wins.
    Of several processes all must call it: they bring the slices together, and the first writes.
    """
    source, arrays, slices = Arrays(params), {}, []
    for name in params:
        shape, dtype = source.shape(name), source.dtype(name)
        chunk = R.Rule(name, name).chunk(shape, dtype.itemsize)
        arrays[name] = (shape, dtype, chunk)
        slices += [(name, index) for index in R.grid(tuple(slice(0, n) for n in shape), chunk)]
    if jax.process_index() > 0:
        for name, index in slices:
            source.read(name, index)
        return
    with atomic_folder(destination, overwrite=overwrite) as folder:
        store = StoreWriter(folder / PARAMS, arrays)
        for name, index in slices:
            store.write(name, index, source.read(name, index))
        store.close()
        copy_companions(folders, folder)
        _write_config(folder, family, config, lora)


def _write_config(folder: Path, family: registry.Family, config: Any, lora: LoRA | None) -> None:
    about = {"version": mmjax.__version__, "format": FORMAT, "family": family.name}
    if lora is not None:
        about["lora"] = dataclasses.asdict(lora)
    text = json.dumps({**config.to_hf(), "mmjax": about}, indent=2)
    (folder / "config.json").write_text(text + "\n")
