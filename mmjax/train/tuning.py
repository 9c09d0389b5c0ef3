"""A peer's tuning config, ``lora.tuning_config=FILE``, put into our own settings.

The file says what is adapted, by the ends of module names, and what is trained whole, by parts of
parameter names; everything else is frozen (instruct_flamingo's ``--tuning_config``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from mmjax.models import opening, registry
from mmjax.models.stated_sizes import with_values
from mmjax.nn import paths
from mmjax.schema import to_dataclass
from mmjax.train.build import absent_files, maker, open_init
from mmjax.train.settings import LoRASettings, ModelSettings, RunSettings
from mmjax.types import MMJaxError, nearest
from mmjax.weights.tuning import PeerNames


@dataclasses.dataclass(frozen=True)
class TuningFile:
    """The keys of a peer's tuning config.

    lora: add fresh adapters. from_pretrained: a PEFT folder to read them from instead; those are
    not trained. lora_target_modules: ends of module names. unfrozen: strings; a parameter whose
    name holds one is trained whole.
    """

    lora: bool = False
    from_pretrained: bool | str | None = None
    lora_target_modules: tuple[str, ...] = ()
    lora_r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    unfrozen: tuple[str, ...] = ()


def applied(settings: RunSettings) -> tuple[RunSettings, dict[str, str]]:
    """Return the settings with ``lora.tuning_config`` written out, and lines to tell of it.

    Settings without one come back as they are. Raises MMJaxError for a file that cannot be read,
    a family that has no such files, and names that match nothing.
    """
    if settings.lora.tuning_config is None:
        return settings, {}
    file = Path(settings.lora.tuning_config)
    about = _read(file)
    if settings.lora != LoRASettings(tuning_config=settings.lora.tuning_config) or settings.train:
        raise MMJaxError(
            f"lora.tuning_config={file} says what is adapted and trained; leave the other settings "
            "of lora, and train, as they are by default"
        )
    family = registry.family(settings.model.family)
    if not hasattr(family.weights, "tuning"):
        raise MMJaxError(
            f"lora.tuning_config: no peer of family {family.name!r} has such files; set "
            "lora.targets and train instead"
        )
    config = _config(settings.model)
    peer: PeerNames = family.weights.tuning(config)
    make, _ = maker(settings.model, LoRASettings(), config, settings.seed)
    names = list(paths.flatten(nnx.state(nnx.eval_shape(make))))
    whole = [name for part in about.unfrozen for name in _unfrozen(part, peer, names, file)]
    lora, freeze, told = LoRASettings(), settings.freeze, {"tuning": str(file)}
    if isinstance(about.from_pretrained, str):
        adapter = Path(about.from_pretrained)
        opened = opening.open_adapters(adapter, family, config).lora
        lora = LoRASettings(
            opened.rank, opened.alpha, opened.rslora, opened.dropout, opened.targets, str(adapter)
        )
        freeze = (*freeze, "*.lora_a", "*.lora_b")  # as PEFT does with adapters it reads
    elif about.lora:
        targets, absent = _targets(about.lora_target_modules, peer, names, file, family.weights)
        lora = LoRASettings(about.lora_r, about.lora_alpha, False, about.lora_dropout, targets)
        if absent:
            told["tuning"] += f"; of other language models: {', '.join(absent)}"
    elif not whole:
        raise MMJaxError(f"{file}: no adapters and nothing unfrozen leave nothing to train")
    train = paths.patterns(whole, names)
    return dataclasses.replace(settings, lora=lora, train=train, freeze=freeze), told


def _read(file: Path) -> TuningFile:
    try:
        text = file.read_text("utf-8")
        given = json.loads(text)
    except OSError as error:
        raise MMJaxError(f"lora.tuning_config {file}: {error.strerror}") from error
    except ValueError as error:
        raise MMJaxError(f"lora.tuning_config {file}: no JSON ({error})") from error
    return to_dataclass(TuningFile, given, str(file))


def _config(model: ModelSettings) -> Any:
    """Return the config of the model, as far as the names of its parameters depend on it."""
    Config = registry.family(model.family).Config
    if absent_files(model):
        return Config.from_hf(with_values(model.plan_config, model.config))
    opened = open_init(model)
    return Config.from_hf(with_values(opened.hf_config if opened else {}, model.config))


def _targets(
    targets: Sequence[str], peer: PeerNames, names: Sequence[str], file: Path, weights: Any
) -> tuple[tuple[str, ...], list[str]]:
    """Return the linear maps that are adapted, and the targets that only other models have."""
    maps, absent = [], []
    for target in targets:
        found = peer.kernels(target, names)
        maps += [weights.lora_target(kernel) for kernel in found]
        if not found and not peer.knows_elsewhere(target):
            modules = peer.modules()
            raise MMJaxError(
                f"{file}: lora_target_modules names {target!r}, and no module ends with it"
                f"{nearest(target, modules)}; there are {', '.join(modules)}"
            )
        absent += [] if found else [target]
    if not maps:
        raise MMJaxError(
            f"{file}: none of lora_target_modules {list(targets)} is in this model; there are "
            f"{', '.join(peer.modules())}"
        )
    return tuple(dict.fromkeys(maps)), absent


def _unfrozen(part: str, peer: PeerNames, names: Sequence[str], file: Path) -> list[str]:
    found = peer.holding(part, names) if part else []
    if not found:
        words = sorted({word for rule in peer.trained for word in rule.theirs.split(".")})
        raise MMJaxError(
            f"{file}: unfrozen names {part!r}, and no parameter's name holds it"
            f"{nearest(part, words)}"
        )
    return found
