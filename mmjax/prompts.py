"""What a model is asked: prompts and images in every form, and the template that lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.templates import TEMPLATES, Template, asking, get_template
from mmjax.types import ImageSource, Message, MMJaxError, Record

Prompt = str | Sequence[int] | Sequence[Message]
Images = ImageSource | Sequence[ImageSource] | None


def image_list(images: Images) -> list[ImageSource]:
    """Return the images of one prompt as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def is_conversation(prompt: Any) -> bool:
    """Tell turns of a conversation from a string and from token ids."""
    turns = isinstance(prompt, list | tuple) and len(prompt) > 0
    return turns and all(isinstance(x, Message) for x in prompt)


def pair(prompts: Any, images: Any) -> tuple[list[Prompt], list[Any]]:
    """Return prompts and their images as two lists of equal length.

    One prompt is a string, a sequence of ints or of Messages; several prompts are a sequence of
    those.
    """
    if hasattr(prompts, "__array__"):  # of numpy, jax or torch, whose numbers are arrays themselves
        prompts = np.asarray(prompts)
    listed = prompts.ndim if isinstance(prompts, np.ndarray) else isinstance(prompts, Sequence)
    if not listed:
        raise MMJaxError(
            f"prompts are {prompts!r:.60}; give a string, a list of token ids, or a list of these"
        )
    single = isinstance(prompts, str) or (
        len(prompts) > 0 and all(isinstance(x, int | np.integer) for x in prompts)
    )
    if single or is_conversation(prompts):
        return [prompts], [images]
    prompts = list(prompts)
    if images is None:
        return prompts, [None] * len(prompts)
    # One image is not a list of them, though a path can be taken apart.
    several = isinstance(images, Sequence | np.ndarray) and not isinstance(images, str | bytes)
    images = list(images) if several else [images]
    if len(images) != len(prompts):
        raise MMJaxError(
            f"there are {len(prompts)} prompts and images for {len(images)}; give one entry a "
            "prompt: an image, a list of images, or None"
        )
    return prompts, images


def asking_template(name: str | Template) -> Template:
    """Return the template that asks: itself, or of one that trains, the one that asks like it.

    A function is taken as it is. Raises MMJaxError for an unknown name, and for one that does not
    tell how questions are asked.
    """
    if callable(name):
        return name
    get_template(str(name))
    return TEMPLATES[name if name.endswith("_prompt") else asking([name])]


def as_record(prompt: Prompt, images: Sequence[ImageSource]) -> Record:
    """Return a question, or a conversation that ends with one, as a template takes it.

    Raises MMJaxError for token ids: what they say is laid out already.
    """
    if isinstance(prompt, str):
        prompt = [Message("user", prompt)]
    if not is_conversation(prompt):
        raise MMJaxError(
            f"a template lays out a question or a list of Messages, and the prompt is "
            f"{prompt!r:.60}; token ids are used as they are: leave the template away"
        )
    return Record(tuple(prompt), tuple(images), {"source": "prompt"})
