"""The vocabulary of a Flamingo that is put together: ids of special tokens, rows of the tables."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.tokenize import load_tokenizer
from mmjax.models.flamingo.config import TOKENIZER_LENGTHS
from mmjax.models.flamingo.processor_config import ProcessorConfig
from mmjax.models.flamingo.sizes import LANGUAGE
from mmjax.models.flamingo.special_tokens import complete_tokenizer
from mmjax.models.language.architecture import Architecture
from mmjax.types import MMJaxError
from mmjax.weights.reader import Reader

log = logging.getLogger(__name__)


def read_ids(
    folders: Sequence[Path], *, answer_token: bool
) -> tuple[dict[str, int | None], int | None]:
    """Return the ids of the special tokens and the size of the vocabulary, from a tokenizer.

    answer_token: whether the model has <answer>.
    """
    found = (load_tokenizer(folder) for folder in dict.fromkeys(folders))
    tokenizer = next((one for one in found if one is not None), None)
    if tokenizer is None:
        return {}, None
    added = ProcessorConfig(answer_token=answer_token)
    return complete_tokenizer(tokenizer, added), len(tokenizer)


def rows_of_tables(
    whole: Reader,
    trained: Reader,
    own: Architecture,
    hf: Mapping[str, Any],
    ids: Mapping[str, Any],
    known: int | None,
) -> tuple[int, dict[str, int]]:
    """Return the vocabulary's size, and the rows of tables that have others.

    The model's own embedding decides. Where only the language model has one, OpenFlamingo cuts or
    extends it to its tokenizer: MPT's 50432 rows to 50280.
    """
    theirs = {rule.ours: LANGUAGE + rule.theirs for rule in own.rules}
    embed, head = theirs["decoder.embed.embedding"], theirs.get("decoder.head.kernel")
    keys, apart = set(whole.keys()), set(whole.keys()) - set(trained.keys())
    if embed not in keys:
        raise MMJaxError(f"no {embed}, neither in the model's files nor in the language model")
    rows = whole.shape(embed)[0]
    if embed in apart:
        first = TOKENIZER_LENGTHS[own.model_type]
        media = hf.get("media_token_id", ids.get("media_token_id"))
        # Without a tokenizer the usual one is a guess, which a smaller table belies.
        last = media if media is not None else first + 1 if rows >= first else 0
        rows = known or max(rows, last + 1)
    resized = {key: rows for key in (embed, head) if key in apart and whole.shape(key)[0] != rows}
    return rows, resized


def tell_rows(whole: Reader, resized: Mapping[str, int]) -> None:
    """Log which tables are cut or extended."""
    for key, rows in resized.items():
        there = whole.shape(key)[0]
        if rows > there:
            log.warning("%s: %d rows, and zeros for %d tokens more", key, there, rows - there)
        else:
            log.info("%s: %d of its %d rows", key, rows, there)


def check_ids(hf: Mapping[str, Any], own: Architecture, rows: int, where: str) -> None:
    """Raise MMJaxError where an end mark's or an image's id has no row in the table."""
    first = TOKENIZER_LENGTHS[own.model_type]
    ids = {"eoc_token_id": first, "media_token_id": first + 1}
    ids = {key: hf.get(key, default) for key, default in ids.items()}
    if max(ids.values()) >= rows:
        said = ", ".join(f"{key} {value}" for key, value in ids.items())
        raise MMJaxError(
            f"{where}: {said}, outside its {rows} rows of embeddings; put the tokenizer it was "
            "trained with beside it or into the --lm folder, or state the ids in its config.json"
        )
