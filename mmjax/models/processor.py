"""What every family's processor has: its settings, a tokenizer or none, and the folder of both."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from mmjax.data.tokenize import load_tokenizer
from mmjax.data.tokenizer_files import save_tokenizer
from mmjax.types import MMJaxError, nearest


class FolderProcessor:
    """A processor that is read from a model folder and written into one.

    A family derives from it, names the class of its settings, and adds ``for_words``, ``encode``,
    ``encode_prompt``, ``decode``, ``token_ids`` and ``check``; see ``mmjax.models.api.Processor``.
    """

    CONFIG: ClassVar[type]
    IN_CONFIG: ClassVar[tuple[str, ...]] = ()  # settings that a model's config states as well

    def __init__(self, config: Any, tokenizer: Any | None):
        self.config = config
        self.tokenizer = tokenizer
        self.folder: str | None = None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> Self:
        """Read a model folder; tokenizer files are optional until a string must be encoded.

        options: settings that count before those of the folder.
        """
        config = dataclasses.replace(cls.CONFIG.from_folder(folder), **options)
        processor = cls(config, load_tokenizer(folder))
        processor.folder = os.fspath(folder)
        return processor

    def with_options(self, **changes: Any) -> Self:
        """Return a processor with other settings: fields of its ProcessorConfig by name.

        Raises MMJaxError for one that there is not, with the nearest name.
        """
        known = [field.name for field in dataclasses.fields(self.config)]
        for name in changes:
            if name not in known:
                raise MMJaxError(
                    f"the processor has no setting {name!r}{nearest(name, known)}; it has "
                    f"{', '.join(known)}"
                )
        other = type(self)(dataclasses.replace(self.config, **changes), self.tokenizer)
        other.folder = self.folder
        return other

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the settings and the tokenizer in files that the peer's own classes load."""
        self.config.save(folder)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    @property
    def patch_dim(self) -> int:
        """Numbers in one row of the visual stream."""
        return self.config.patch_dim


def follow(config: Any, processor: Any, options: Mapping[str, Any]) -> Any:
    """Return a model's config that says what the options of its processor do.

    options: what was asked of the processor beside its own files; of those that the config states
    too, one that differs is told.
    """
    shared = getattr(processor, "IN_CONFIG", ())
    changes = {name: x for name, x in options.items() if name in shared}
    changes = {name: x for name, x in changes.items() if x != getattr(config, name)}
    for name, value in changes.items():
        logging.getLogger(__name__).warning(
            f"the processor's {name} is {value!r}, as was asked; the model's own is "
            f"{getattr(config, name)!r}"
        )
    return dataclasses.replace(config, **changes) if changes else config
