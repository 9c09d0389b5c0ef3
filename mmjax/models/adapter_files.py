"""The files of a PEFT adapter, and of what lies beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.models import registry
from mmjax.models.json_files import read_json
from mmjax.models.parts import Partial
from mmjax.nn.linear import LoRA
from mmjax.types import MMJaxError
from mmjax.weights import peft
from mmjax.weights import rules as R
from mmjax.weights.adapter_reader import AdapterReader
from mmjax.weights.reader import Reader, Renamed


def partial_adapter(family: registry.Family) -> Partial | None:
    """Return the file of whole tensors that a family's adapters have beside them, None if none."""
    return getattr(family.weights, "ADAPTER_BESIDE", None)


def without_config(folder: Path) -> str | None:
    """Return the file in a folder that only adapters of some family have beside them."""
    known = (partial_adapter(family) for family in registry.FAMILIES.values())
    return next((one.file for one in known if one and (folder / one.file).is_file()), None)


def adapter_config(folder: Path) -> dict[str, Any]:
    about = read_json(folder, "adapter_config.json")
    if not about:
        raise MMJaxError(
            f"{folder}: LoRA weights without adapter_config.json, which holds their scale; "
            "copy it beside them"
        )
    return about


def peft_names(raw: Reader, family: registry.Family, table: Sequence[R.Rule]) -> Renamed:
    """Return a PEFT adapter's tensors in the names of the family's table."""
    weights = family.weights
    # What stands in no layer may have a name in memory by which no model is told, as lm_head.
    known = {_module(weights.from_hub(r.theirs, weights.ADAPTER_LAYOUT)): r for r in table}

    def rename(key: str) -> str:
        # An adapted head or embedding is also saved whole, under its wrapper's name.
        key = key.removeprefix(peft.PREFIX).replace(".base_layer.", ".")
        if rule := known.get(module := _module(key)):
            return _module(rule.theirs) + key.removeprefix(module)
        layout = family.weights.detect_layout([key])
        return family.weights.to_hub(key, layout) if layout else key

    return Renamed(raw, rename)


def _module(key: str) -> str:
    """Return the name of the module that a tensor is of, adapters included."""
    return key.split(".lora_")[0].removesuffix(".weight").removesuffix(".bias")


def whole_tensors(
    named: Renamed, table: Sequence[R.Rule], shapes: Mapping[str, R.Shape]
) -> tuple[str, ...]:
    """Return our parameters that an adapter trained whole: modules_to_save, and biases.

    named: as ``peft_names`` returns it. The kernel under an adapted head is the base's own.
    """
    untrained = re.compile(r"\.lora_|\.base_layer\.weight$")
    keys = {key for key, own in named.names.items() if not untrained.search(own)}
    mine = R.by_ours(table, shapes).items()
    return tuple(name for name, rule in mine if not keys.isdisjoint(rule.keys(shapes[name])))


def refuse_untied(
    folder: Path,
    about: Mapping[str, Any],
    pairs: Reader,
    table: Sequence[R.Rule],
    config: Any,
) -> None:
    """Raise MMJaxError where an adapter holds one of two tables that its model has as one.

    table, config: of the model. PEFT's copy of a module (``modules_to_save``) is tied to nothing.
    """
    if not config.decoder.tied:
        return
    whole = {key for key in pairs.keys() if ".lora_" not in key}  # noqa: SIM118
    embed = next(rule.theirs for rule in table if rule.ours == "decoder.embed.embedding")
    size = config.decoder.vocab_size, config.decoder.d_model
    heads = [key for key in whole - {embed} if tuple(pairs.shape(key)) == size]
    if embed in whole and heads:
        apart = any(not np.array_equal(pairs.read(key), pairs.read(embed)) for key in heads)
    else:
        apart = bool(heads) or (embed in whole and bool(about.get("modules_to_save")))
    if apart:
        raise MMJaxError(
            f"{folder}: holds {', '.join(sorted({embed, *heads} & whole))} of its own, and the "
            "model's head is its embedding (tie_word_embeddings); merge the adapter with PEFT "
            "(merge_and_unload), set tie_word_embeddings to false, save the model and convert it"
        )


def adapter_pairs(
    reader: Reader,
    about: Mapping[str, Any],
    family: registry.Family,
    table: Sequence[R.Rule],
    shapes: Mapping[str, R.Shape],
) -> tuple[AdapterReader, list[R.Rule], LoRA]:
    """Return the LoRA pairs in a reader, the rules that read them, and what they amount to.

    table, shapes: of the model they belong to; the table says how its maps are cut.
    """
    theirs = reader.names if isinstance(reader, Renamed) else None
    unused = getattr(family.weights, "UNUSED_MAPS", ())
    pairs = AdapterReader(reader, about, table, shapes, theirs, unused)
    stems = tuple(kernel.removesuffix("kernel") for kernel in pairs.kernels)
    rules = [r for r in peft.adapter_rules(table) if r.ours.startswith(stems)]
    targets = tuple(family.weights.lora_target(kernel) for kernel in pairs.kernels)
    return pairs, rules, LoRA(pairs.rank, pairs.alpha, targets, pairs.rslora, pairs.dropout)
