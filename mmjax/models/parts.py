"""Files that hold a part of a model: what else is given, and what a family makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmjax.types import MMJaxError, nearest
from mmjax.weights.reader import Reader


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the parts lie that a model folder or file leaves out.

    lm: folder of its language model. vision: file or folder of its vision tower. vision_config: the
    tower's sizes: the name of a published tower, or a JSON file. tuning_config: JSON file with the
    scale of the adapters that a peer's training file holds.
    """

    lm: str | Path | None = None
    vision: str | Path | None = None
    vision_config: str | Path | None = None
    tuning_config: str | Path | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Parts:
        """Return parts given by name; raises MMJaxError for a name that is none of them."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                near = nearest(name, names)
                raise MMJaxError(f"{name!r} is no part of a model; one of {', '.join(names)}{near}")
        return cls(**given)

    def given(self) -> list[str]:
        """Return the names of those that are given."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A model put together from its parts by ``assemble`` of its family's weights.

    hf: its config.json. reader: all of it, in the names that ``rules(config, layout)`` speak, but
    for the parameters that glob patterns of ``fresh`` name: nobody has trained those yet.
    adapter: settings of the LoRA pairs in ``reader``, in the words of PEFT; None without any.
    rows: of its tables of the vocabulary, where ``hf`` tells of more, those of tokens that the
    family adds to its parts; None where they are as ``hf`` says.
    folders: where companion files of the parts lie. options: what the processor cannot read there.
    """

    hf: Mapping[str, Any]
    reader: Reader
    layout: str
    adapter: Mapping[str, Any] | None = None
    fresh: tuple[str, ...] = ()
    rows: int | None = None
    folders: tuple[Path, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Partial:
    """A layout whose files hold a part of the model.

    file: the file of torch.save it is written as. keeps: tells whether it holds a tensor, by key,
    of a model of this config. says: what config.json says otherwise than that of the whole model.
    adapted: whether it holds the kernels that adapters are merged into as well.
    """

    file: str
    keeps: Callable[[str, Any], bool]
    says: Callable[[Any], dict[str, Any]] = lambda config: {}
    adapted: bool = True


_ALIKE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Name the sizes in which two config.json of language models differ, '' where they agree."""
    both = (key for key in _ALIKE if None not in (ours.get(key), theirs.get(key)))
    return ", ".join(f"{k} {ours[k]} and {theirs[k]}" for k in both if ours[k] != theirs[k])


def split_chain(path: str | Path) -> list[Path]:
    """Return the files of a chain ``a.pt,b.pt``; a path that exists is one, commas or not.

    Raises MMJaxError for a chain with nothing in it, or nothing between two commas.
    """
    text = str(path)
    if "," not in text or Path(text).exists():
        chain = [text]
    else:
        chain = [part.strip() for part in text.split(",")]
    if not all(chain):
        raise MMJaxError(
            f"the chain of files {text!r} has an empty place; give files separated by single "
            "commas, the first to be loaded first: a.pt,b.pt"
        )
    return [Path(part) for part in chain]
