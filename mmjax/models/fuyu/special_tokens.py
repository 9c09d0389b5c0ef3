"""The tokens that Fuyu's stream is made of: their ids, and whether a model has the same."""

from __future__ import annotations

from typing import Any

from mmjax.data.tokenize import token_id
from mmjax.data.tokenizers_small import UNDERSCORE
from mmjax.types import MMJaxError


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Return the ids of Fuyu's special tokens by their names in its processor's config.

    Raises one MMJaxError with all that the tokenizer lacks, and for one that was read otherwise
    than it was made.
    """
    names = {
        "image_token_id": "|SPEAKER|",
        "newline_token_id": "|NEWLINE|",
        "answer_token_id": "<0x04>",
        "bos_token_id": "<s>",
        "eos_token_id": "|ENDOFTEXT|",
    }
    ids = {key: token_id(tokenizer, name) for key, name in names.items()}
    for key in ("bos_token_id", "eos_token_id"):
        if ids[key] is None:
            ids[key] = getattr(tokenizer, key)
    missing = [names[key] for key, value in ids.items() if value is None]
    if missing:
        raise MMJaxError(
            f"the tokenizer lacks {', '.join(missing)}: it is not Fuyu's; use the tokenizer files "
            "of the model, or build one with mmjax.data.tokenizers_small"
        )
    if not _opens_with_underscore(tokenizer):
        raise MMJaxError(
            "the tokenizer begins a text without the underscore that Fuyu's puts before it, so its "
            "tokens would be others: transformers reads the tokenizer.model of a Fuyu so; put the "
            "tokenizer.json of the model beside it"
        )
    return ids


def _opens_with_underscore(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids[0]).startswith(UNDERSCORE)


def check_vocabulary(processor: Any, vocab_size: int, image_token_id: int) -> None:
    """Raise MMJaxError when the tokenizer cannot belong to a model of these numbers.

    A vocabulary smaller than the table is fine: tables are padded. No tokenizer passes too.
    """
    if processor.tokenizer is None:
        return
    size = len(processor.tokenizer)
    if size > vocab_size:
        raise MMJaxError(
            f"the tokenizer has {size} tokens but the model's vocab_size is {vocab_size}: they are "
            "of different models; use the tokenizer the model was trained with"
        )
    if processor.image_token_id != image_token_id:
        raise MMJaxError(
            f"the tokenizer puts |SPEAKER| at {processor.image_token_id} but the model's "
            f"image_token_id is {image_token_id}: they are of different models; use the "
            "tokenizer the model was trained with, or correct image_token_id in config.json"
        )
