"""Tokenizers without torch, and which tokens of a text are supervised."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.types import BadSample, MMJaxError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SHORT = 1024  # letters; thousands of documents would fill the memory of every data worker


def load_tokenizer(folder: str | os.PathLike) -> Any | None:
    """Load the tokenizer of a model folder; None when the folder holds no tokenizer file.

    Raises MMJaxError naming the file when it is there but cannot be read; tokenizer.model alone
    needs sentencepiece.
    """
    present = [f for f in TOKENIZER_FILES if os.path.isfile(os.path.join(folder, f))]
    if not present:
        return None
    readers = ("sentencepiece", "tiktoken")
    if present[0] == "tokenizer.model" and not any(map(importlib.util.find_spec, readers)):
        raise MMJaxError(
            f"{os.path.join(folder, present[0])}: a SentencePiece model, and sentencepiece is not "
            "installed; put the tokenizer.json of the same model beside it, or run "
            "pip install sentencepiece"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is read as it stands: a tokenizer class named beside it (LlamaTokenizer for
    # Fuyu) may rebuild the normaliser and with it other ids.
    loader = PreTrainedTokenizerFast if present[0] == "tokenizer.json" else AutoTokenizer
    try:
        return loader.from_pretrained(os.fspath(folder), local_files_only=True)
    except Exception as error:  # transformers, tokenizers and sentencepiece share no error type
        raise MMJaxError(
            f"{os.path.join(folder, present[0])}: cannot be read as a tokenizer ({error}); copy it "
            "anew from the original model"
        ) from error


def token_id(tokenizer: Any, token: str) -> int | None:
    """Look up one token; None when the vocabulary lacks it (transformers would answer <unk>)."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        return None
    return int(found)


def need_tokenizer(tokenizer: Any | None, folder: str | None) -> Any:
    """Return the tokenizer; raises MMJaxError naming the folder that has none."""
    if tokenizer is None:
        raise MMJaxError(
            f"{folder or 'this processor'} has no tokenizer.json or tokenizer.model, so "
            "text cannot be encoded or decoded; put the language model's tokenizer files "
            "beside its config.json, or give the prompt as token ids"
        )
    return tokenizer


def table_rows(tokenizer: Any) -> int:
    """Return the rows of a new model's vocabulary: rounded up to 64, to divide over any mesh."""
    return -(-len(tokenizer) // 64) * 64


def opening_ids(tokenizer: Any, bos: bool | None) -> list[int]:
    """Return the ids a prompt begins with: what the tokenizer puts there, or <bos>, or nothing.

    bos: None for the tokenizer's own way. Raises MMJaxError when True and there is no <bos>.
    """
    if bos is None:
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = range(len(whole) - len(bare) + 1)
        return whole[: next((i for i in starts if whole[i : i + len(bare)] == bare), 0)]
    if bos and tokenizer.bos_token_id is None:
        raise MMJaxError("bos = True, but the tokenizer has no bos_token; leave bos at None")
    return [tokenizer.bos_token_id] if bos else []


def encode_text(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise without special tokens: ids int32[t] and character spans int32[t,2], read-only.

    Short texts are remembered, because prompts repeat: the same question is asked of many images.
    Raises BadSample ``bad_text`` for half a surrogate pair, which JSON can hold and no tokenizer
    reads.
    """
    return (_remembered if len(text) <= _SHORT else _encoded)(tokenizer, text)


def forget_texts() -> None:
    """Forget the texts that ``encode_text`` remembers: a tokenizer has changed."""
    _remembered.cache_clear()


def _encoded(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise BadSample(
            "bad_text",
            f"the text holds half a character, {text[error.start]!a}, in {around}; it was cut "
            "within an emoji or the like: mend it or drop the record",
        ) from error
    if text:
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    else:
        ids, spans = [], []
    arrays = np.asarray(ids, np.int32), np.asarray(spans, np.int32).reshape(-1, 2)
    for array in arrays:
        array.flags.writeable = False
    return arrays


_remembered = functools.lru_cache(maxsize=4096)(_encoded)


def supervised_tokens(spans: np.ndarray, pieces: Sequence[tuple[str, bool]]) -> np.ndarray:
    """Mark the tokens whose whole span lies in supervised text: bool[t].

    spans: [t,2] into the joined pieces. pieces: (text, supervised), in order. A token that reaches
    over a border into unsupervised text is not a target.
    """
    if not any(loss for _, loss in pieces):
        return np.zeros(len(spans), bool)
    wanted = np.concatenate([np.full(len(text), loss, bool) for text, loss in pieces] or [[]])
    missed = np.concatenate([[0], np.cumsum(~wanted.astype(bool))])  # unsupervised before i
    starts, ends = spans[:, 0], spans[:, 1]
    # A token without characters (a lone prefix mark) counts as the character it stands before, at
    # the end as the one behind which it stands: GPT-NeoX's spans leave white space out.
    starts = np.minimum(starts, np.where(ends == starts, len(wanted) - 1, starts))
    ends = np.minimum(np.maximum(ends, starts + 1), len(wanted))
    return (missed[ends] == missed[starts]) & (ends > starts)
