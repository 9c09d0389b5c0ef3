"""The folder of a converted model: ``params/`` and config.json; written, and opened again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mmjax
from mmjax.models import registry
from mmjax.models.companions import copy_companions, with_all_ends
from mmjax.models.pretrained import Pretrained, check
from mmjax.models.views import is_lora, stored_dtype
from mmjax.nn.linear import LoRA
from mmjax.types import MMJaxError
from mmjax.weights import rules as R
from mmjax.weights.load import Progress
from mmjax.weights.store import StoreReader, StoreWriter
from mmjax.weights.writer import Arrays, atomic_folder

FORMAT = 1
PARAMS = "params"
_TRAINING = "_CHECKPOINT_METADATA"  # Orbax writes it, into what train.py saves


def is_converted(path: Path, hf: Mapping[str, Any]) -> bool:
    """Tell whether a folder was written by mmjax, finished or not. hf: its config.json, or {}."""
    return path.is_dir() and ("mmjax" in hf or (path / PARAMS).is_dir())


def open_converted(path: Path, hf: dict[str, Any]) -> Pretrained:
    """Open such a folder; raises MMJaxError for one that is half-written, or too new."""
    about = hf.get("mmjax")
    if about is None and (path / _TRAINING).is_file():
        raise MMJaxError(
            f"{path}: a checkpoint of a run, which holds what was trained alone, and no model; the "
            f"run writes one when it ends, {path.parent.parent / 'model'}, and `python -m "
            f"convert_weights.from_run {path} DST` before. eval.py evaluates a checkpoint"
        )
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
    noted = tuple(about.get("trained", ()))
    return Pretrained(
        *(path, "mmjax", family, hf, config, reader, same, (), lora, (path,)),
        trained=noted,
        template=about.get("template"),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion is going to write: (shape, dtype, chunk) of each of our parameters."""

    arrays: dict[str, tuple[R.Shape, np.dtype, R.Shape]]

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d, _ in self.arrays.values())


def plan_conversion(
    opened: Pretrained, abstract: Mapping[str, jax.ShapeDtypeStruct], dtype: str = "keep"
) -> Plan:
    """Check an opened model against its parameters and lay out the converted folder.

    dtype: ``bfloat16``, ``float32`` or ``keep``; LoRA leaves stay float32, they are trained.
    """
    shapes, arrays = check(opened, abstract), {}
    for name, rule in R.by_ours(opened.rules, shapes).items():
        kind = np.dtype(np.float32)
        if not is_lora(name):
            own = stored_dtype(rule, opened.reader, shapes[name])
            kind = np.dtype(own if dtype == "keep" else dtype)
        arrays[name] = (shapes[name], kind, rule.chunk(shapes[name], kind.itemsize))
    return Plan(arrays)


def write_converted(
    opened: Pretrained,
    plan: Plan,
    destination: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a converted folder, one piece of a parameter at a time; it appears whole or not."""
    with atomic_folder(destination, overwrite=overwrite, nbytes=plan.nbytes) as folder:
        store = StoreWriter(folder / PARAMS, plan.arrays)
        table = R.by_ours(opened.rules, plan.arrays)
        for name, (shape, dtype, chunk) in plan.arrays.items():
            rule = table[name]
            for index in R.grid(tuple(slice(0, n) for n in shape), chunk):
                block = R.read_piece(rule, opened.reader, shape, index, dtype)
                store.write(name, index, block)
                if progress is not None:
                    progress(block.nbytes)
        store.close()
        copy_companions(opened.folders, folder)
        hf = with_all_ends(opened.config.to_hf(), opened.hf_config)
        _write_config(folder, opened.family, hf, opened.lora, opened.trained, opened.template)


def save_model(
    destination: str | Path,
    params: Mapping[str, Any] | Arrays,
    *,
    family: registry.Family,
    config: Any,
    lora: LoRA | None = None,
    trained: Sequence[str] = (),
    template: str | None = None,
    folders: Sequence[Path] = (),
    overwrite: bool = False,
) -> None:
    """Write parameters in memory, by dotted name, as a folder that ``mmjax.load`` reads.

    params: the arrays, or what reads them slice by slice, as ``views.MultipliedOut``.
    trained, template: see ``Pretrained``. folders: where to copy tokenizer and processor files
    from; the first that has one wins.
    Of several processes all must call it: they bring the slices together, and the first writes.
    """
    source = params if isinstance(params, Arrays) else Arrays(params)
    arrays, slices = {}, []
    for name in source.keys():  # noqa: SIM118
        shape, dtype = source.shape(name), source.dtype(name)
        chunk = R.Rule(name, name).chunk(shape, dtype.itemsize)
        arrays[name] = (shape, dtype, chunk)
        slices += [(name, index) for index in R.grid(tuple(slice(0, n) for n in shape), chunk)]
    if jax.process_index() > 0:
        for name, index in slices:
            source.read(name, index)
        return
    nbytes = Plan(arrays).nbytes
    with atomic_folder(destination, overwrite=overwrite, nbytes=nbytes) as folder:
        store = StoreWriter(folder / PARAMS, arrays)
        for name, index in slices:
            store.write(name, index, source.read(name, index))
        store.close()
        copy_companions(folders, folder)
        _write_config(folder, family, config.to_hf(), lora, trained, template)


def _write_config(
    folder: Path,
    family: registry.Family,
    hf: Mapping[str, Any],
    lora: LoRA | None,
    trained: Sequence[str],
    template: str | None,
) -> None:
    about = {"version": mmjax.__version__, "format": FORMAT, "family": family.name}
    if lora is not None:
        about["lora"] = dataclasses.asdict(lora)
        about["trained"] = list(trained)
    if template is not None:
        about["template"] = template
    text = json.dumps({**hf, "mmjax": about}, indent=2)
    (folder / "config.json").write_text(text + "\n", "utf-8")
