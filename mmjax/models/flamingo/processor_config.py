"""The settings of Flamingo's processor, read from and written as Hugging Face's files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from mmjax.models.json_files import read_json
from mmjax.models.square_images import SquareImages, read_image_file
from mmjax.types import MMJaxError

AttendMode = Literal["previous", "next", "random"]

IDS = ("media_token_id", "eoc_token_id", "answer_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class ProcessorConfig(SquareImages):
    """How Flamingo sees an image, and its token ids where no tokenizer says them.

    Fields of ``SquareImages`` and: frames: pictures in one medium, 1 but for video models.
    max_media: media that a sample may have, as many as the model has embeddings of; None without.
    attend_mode: which medium text looks at: the ``previous`` one, the ``next`` (version 1 with
    attend_previous=False), or in training one of the two for each sample at ``random``, drawn anew
    in every epoch (version 1 with use_media_placement_augmentation); it answers as ``previous``.
    bos: begin with <bos>; None does as the tokenizer does (LLaMA's yes, GPT-NeoX's no), True as
    Otter's training does with any. answer_token: add Otter's ``<answer>`` to a tokenizer that lacks
    it. image_mark: the token that stands for a medium, and its mark in a string prompt.
    """

    frames: int = 1
    max_media: int | None = None
    attend_mode: AttendMode = "previous"
    bos: bool | None = None
    answer_token: bool = False
    image_mark: str = "<image>"
    media_token_id: int | None = None
    eoc_token_id: int | None = None
    answer_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    OWN: ClassVar[tuple[str, ...]] = (
        *(*SquareImages.OWN, "frames", "attend_mode", "bos", "answer_token", "image_mark"),
    )

    def __post_init__(self) -> None:
        """Raise MMJaxError for settings that no pipeline has."""
        super().__post_init__()
        self.check_word("attend_mode", AttendMode)
        self.check_counts("frames", *(["max_media"] if self.max_media is not None else []))
        if not self.image_mark:
            raise MMJaxError("image_mark is empty; give the token that stands for an image")

    @property
    def patch_dim(self) -> int:
        """Values in one medium: frames, rows, columns, channels."""
        return self.frames * self.image_size * self.image_size * 3

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> ProcessorConfig:
        """Read a model folder: the processor's file and, for ids and size, ``config.json``.

        Without a processor's file it is open_clip's transform at the tower's size, of an Otter that
        of CLIPImageProcessor, by which it answers. A model that has ``<answer>`` asks for it,
        whether the tokenizer beside it has it or not. Raises MMJaxError naming a file that is not
        JSON.
        """
        telling = read_image_file(folder)
        model = read_json(folder, "config.json") or {}
        config = cls.from_hf(telling) if telling else cls()
        changes: dict[str, Any] = {}
        vision = model.get("vision_config") or {}
        if not telling and isinstance(vision.get("image_size"), int):
            changes["image_size"] = vision["image_size"]
        changes["max_media"] = (model.get("perceiver_config") or {}).get("max_media")
        text = model.get("text_config") or {}
        for key in IDS:
            value = model.get(key, text.get(key))
            if isinstance(value, int):
                changes[key] = value
        if "answer_token_id" in changes or is_otter(model):
            changes["answer_token"] = True
            changes |= {} if telling else {"fit": "crop_down"}
        return dataclasses.replace(config, **changes)


def is_otter(hf: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is of Otter's classes, which know ``<answer>``.

    They add it to the language model's own tokenizer, which may be all that lies in the folder.
    """
    named = hf.get("architectures") or [""]
    return hf.get("model_type") == "otter" or str(named[0]).startswith("Otter")
