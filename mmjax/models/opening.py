"""Open a model in any layout: converted, a PyTorch checkpoint, an adapter, or parts of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.models import converted, registry
from mmjax.models.adapter_files import (
    adapter_config,
    adapter_pairs,
    partial_adapter,
    peft_names,
    refuse_untied,
    whole_tensors,
    without_config,
)
from mmjax.models.json_files import read_json
from mmjax.models.parts import Assembled, Parts, differing, split_chain
from mmjax.models.pretrained import Pretrained, abstract_params, refuse_own_head
from mmjax.models.views import Subset, is_lora
from mmjax.parallel.mesh import use
from mmjax.types import MMJaxError
from mmjax.weights import peft
from mmjax.weights.reader import Overlay, Reader, Renamed, open_reader
from mmjax.weights.writer import refuse_incomplete


def open_pretrained(
    path: str | Path, *, base: str | Path | None = None, **parts: str | Path | None
) -> Pretrained:
    """Open a converted folder, a PyTorch checkpoint (folder or file) or a PEFT adapter.

    path: several files separated by commas are one model: of a tensor in more than one of
        them, the last counts.
    base: folder of the model an adapter belongs to; by default the local folder that its
        adapter_config.json names. Where the adapter's own config.json tells a whole model, this
        may be the language model alone, as ``lm`` is.
    parts: where the parts lie that it leaves out; see ``Parts``.
    Raises MMJaxError for what is missing, half-written, damaged or of no known family.
    """
    given, chain = Parts.of(parts), split_chain(path)
    for one in chain:
        refuse_incomplete(one)
    folders = tuple(dict.fromkeys(p if p.is_dir() else p.parent for p in chain))
    hf = next((found for f in folders if (found := read_json(f, "config.json"))), {})
    path = chain[0]
    if {"model", "data", "optim"} <= hf.keys():  # the settings of a run
        model = folders[0] / "model"
        when = "" if model.is_dir() else ", which it writes when it ends"
        raise MMJaxError(f"{path}: a workdir of train.py, not a model; its model is {model}{when}")
    if len(chain) == 1 and converted.is_converted(path, hf):
        if given.given():
            raise MMJaxError(
                f"{path}: a converted folder, which is whole; leave {_options(given)} away"
            )
        return converted.open_converted(path, hf)
    raw = [open_reader(one) for one in chain]
    keys = [key for reader in raw for key in reader.keys()]  # noqa: SIM118
    about = (folders[0] / "adapter_config.json").is_file()
    adapted = (key for key in keys if ".lora_A." in key or ".lora_embedding_A" in key)
    if any(about or key.startswith(peft.PREFIX) for key in adapted):
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
) -> Pretrained:
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
) -> Pretrained:
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
    opened = Pretrained(
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
    refuse_own_head(opened)
    if made.adapter is None:
        return opened
    pairs, rules, lora = _adapted(opened, made.reader, made.adapter)
    return dataclasses.replace(opened, reader=pairs, rules=(*opened.rules, *rules), lora=lora)


def _adapted(under: Pretrained, reader: Reader, about: Mapping[str, Any]):
    """Return ``adapter_pairs`` of the adapters in a reader that belong to a model."""
    return adapter_pairs(reader, about, under.family, under.rules, _shapes(under))


def _shapes(under: Pretrained) -> dict[str, tuple[int, ...]]:
    with use():
        abstract = abstract_params(under.family, under.config)
    return {name: tuple(leaf.shape) for name, leaf in abstract.items()}


def _options(given: Parts) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in given.given())


def _open_adapter(
    folder: Path,
    raw: Reader,
    base: str | Path | None,
    parts: Mapping[str, Any],
    hf: Mapping[str, Any],
) -> Pretrained:
    about = adapter_config(folder)
    named = about.get("base_model_name_or_path")
    base = base or parts.get("lm") or (named if named and Path(named).is_dir() else None)
    if base is None:
        raise MMJaxError(
            f"{folder}: an adapter of {named or 'an unnamed model'}; give that model's folder "
            "with --base DIR (in Python base=...). train.py and eval.py take both as one model, "
            "which convert_weights.to_jax makes of them"
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
            "is converted; give what it was converted from, or write it for PyTorch with "
            "convert_weights.to_hf"
        )
    if beside is None:
        under = open_pretrained(base, **parts)
    else:
        under = _base_and_beside(folder, folder / beside.file, family, base, parts, hf)
    if under.lora is not None:
        raise MMJaxError(
            f"--base {base}: holds adapters itself; merge them first (convert_weights.merge)"
        )
    named = peft_names(raw, under.family, under.rules)
    pairs, rules, lora = _adapted(under, named, about)
    refuse_untied(folder, about, pairs, under.rules, under.config)
    return dataclasses.replace(
        under,
        path=folder,
        kind="peft",
        # Whole tensors in an adapter (modules_to_save, biases) replace the base's.
        reader=Overlay(under.reader, pairs),
        rules=(*under.rules, *rules),
        lora=lora,
        folders=(folder, *under.folders),
        trained=whole_tensors(named, under.rules, _shapes(under)),
    )


def _base_and_beside(
    folder: Path,
    file: Path,
    family: registry.Family,
    base: str | Path,
    parts: Mapping[str, Any],
    hf: dict[str, Any],
) -> Pretrained:
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


def open_adapters(path: str | Path, family: registry.Family, config: Any) -> Pretrained:
    """Open the adapters alone of a PEFT folder or of a converted folder that has some.

    family, config: of the model they stand beside; its own weights are not needed.
    """
    path = Path(path)
    hf = read_json(path, "config.json") or {}
    if converted.is_converted(path, hf):
        found = converted.open_converted(path, hf)
        if found.lora is None:
            raise MMJaxError(f"{path}: holds no adapters")
        rules = tuple(rule for rule in found.rules if is_lora(rule.ours))
        reader = Subset(found.reader, [rule.theirs for rule in rules])
        return dataclasses.replace(found, reader=reader, rules=rules)
    refuse_incomplete(path)
    raw, folder = open_reader(path), path if path.is_dir() else path.parent
    table = tuple(family.weights.rules(config))
    alone = Pretrained(path, "peft", family, {}, config, raw, table, (), None, (folder,))
    pairs, rules, lora = _adapted(alone, peft_names(raw, family, table), adapter_config(folder))
    return dataclasses.replace(alone, reader=pairs, rules=tuple(rules), lora=lora)
