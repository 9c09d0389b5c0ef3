"""Say what a model is, without loading it.

python -m convert_weights.inspect SRC [--base DIR] [--lm DIR] [--vision FILE_OR_DIR] ...
"""

import collections
import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from convert_weights.sources import add_source, open_source
from mmjax.cli import Parser, run_guarded
from mmjax.models import pretrained
from mmjax.monitor.transfer import gigabytes
from mmjax.parallel.mesh import use
from mmjax.weights import rules as R


def main(argv: list[str] | None = None) -> int:
    parser = Parser("convert_weights.inspect", __doc__)
    add_source(parser)
    args = parser.read(argv)
    opened = open_source(args)
    with use():
        abstract = pretrained.abstract_params(opened.family, opened.config, lora=opened.lora)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    try:
        R.check(opened.rules, shapes, opened.reader, opened.ignore)
        verdict = "every key is claimed by a rule, every parameter has its key"
    except R.WeightsMismatch as error:
        verdict = str(error)
    table = _table(opened, shapes, verdict)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return 0 if verdict.startswith("every") else 2


def _table(opened: pretrained.Pretrained, shapes: Mapping[str, R.Shape], verdict: str) -> Table:
    rows: list[tuple[str, str]] = []
    kinds: collections.Counter = collections.Counter()
    size = 0
    for key in opened.reader.keys():  # noqa: SIM118
        count, dtype = math.prod(opened.reader.shape(key)), opened.reader.dtype(key)
        kinds[str(dtype)] += count
        size += count * dtype.itemsize
    files = list(dict.fromkeys(opened.reader.files))
    alone = len({f.parent for f in files}) == 1
    files = [f.name if alone else f"{f.parent.name}/{f.name}" for f in files]
    parts: collections.Counter = collections.Counter()
    for name, shape in shapes.items():
        parts[name.split(".")[0]] += math.prod(shape)
    rows.append(("family, layout", f"{opened.family.name}, {opened.kind}"))
    rows.append(("files", ", ".join(files[:4]) + (f" ... {len(files)}" if len(files) > 4 else "")))
    rows.append(("numbers", f"{sum(kinds.values()):,} in {gigabytes(size)}"))
    rows.append(("parameters", ", ".join(f"{k} {n:,}" for k, n in parts.items())))
    rows.append(("dtypes", ", ".join(f"{k} {n:,}" for k, n in kinds.most_common())))
    if opened.lora is not None:
        lora = opened.lora
        rows.append(("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}: {', '.join(lora.targets)}"))
    for name, value in opened.config.__dict__.items():
        rows.append((name, _settings(value) if dataclasses.is_dataclass(value) else str(value)))
    rows.append(("rope_theta", _theta(opened, opened.config.decoder.rope_theta)))
    rows.append(("keys", verdict))
    table = Table(title=Text(str(opened.path)), show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, Text(value))  # brackets in names are no markup
    return table


def _settings(config: Any) -> str:
    """Return the values of a part's config, without switches that are off."""
    told = []
    for name, value in config.__dict__.items():
        if value is True:
            told.append(name)
        elif name != "rope_theta" and value not in (None, False, 1.0, 0, "none"):
            told.append(f"{name} {value}")
    return ", ".join(told)


def _theta(opened: pretrained.Pretrained, value: float) -> str:
    """Say which theta is used and why: a wrong one in config.json is a known trap."""
    if opened.family.name != "fuyu":  # the others have published models of more than one, or none
        return f"{value:g}" if opened.config.decoder.position == "rope" else "none"
    text = f"{value:g} (config.json says {_stated_theta(opened.hf_config)})"
    own = type(opened.config)().decoder.rope_theta
    if value != own:
        text += f"; the published models have {own:g}: correct config.json if this is one of them"
    return text


def _stated_theta(hf: dict) -> str:
    nested = hf.get("text_config") or {}
    places = (hf, hf.get("rope_parameters"), nested.get("rope_parameters"), nested)
    for place in places:
        if isinstance(place, dict) and place.get("rope_theta") is not None:
            return f"{place['rope_theta']:g}"
    return "nothing: the family's own value, not the library's default of 10000"


if __name__ == "__main__":
    sys.exit(run_guarded(main))
