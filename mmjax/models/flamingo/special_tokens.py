"""The tokens that Flamingo adds to a language model's tokenizer."""

from __future__ import annotations

import logging
from typing import Any

from mmjax.data.tokenize import forget_texts, token_id
from mmjax.models.flamingo.processor_config import ProcessorConfig
from mmjax.types import MMJaxError

EOC = "<|endofchunk|>"
ANSWER = "<answer>"
PAD = "<PAD>"

_ENDS = ("</s>", "<|endoftext|>", "|ENDOFTEXT|")  # of LLaMA and OPT, GPT-NeoX and MPT, and here


def complete_tokenizer(tokenizer: Any, config: ProcessorConfig) -> dict[str, int | None]:
    """Add the tokens that a tokenizer lacks, in place, and return the ids of all of them.

    In the peers' order, so that rows of their embedding tables fit: <|endofchunk|>, <image>, with
    ``answer_token`` Otter's <answer>, and <PAD> where no pad token is set. Says so once in the log.
    Raises MMJaxError when no token ends a text.
    """
    wanted = [EOC, config.image_mark] + [ANSWER] * config.answer_token
    # A mark that is an ordinary piece would not be cut out of a text as a whole: it is added, too.
    missing = [token for token in wanted if token not in tokenizer.get_added_vocab()]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
        missing.append(PAD)
    if missing:
        told = ", ".join(f"{token} = {token_id(tokenizer, token)}" for token in missing)
        logging.getLogger(__name__).info("added to the tokenizer: %s", told)
        forget_texts()  # they now come out otherwise
    ends = (token_id(tokenizer, token) for token in _ENDS)
    end = next(
        (i for i in (tokenizer.eos_token_id, config.eos_token_id, *ends) if i is not None), None
    )
    if end is None:
        raise MMJaxError(
            "the tokenizer names no token that ends a text; give eos_token in its "
            "tokenizer_config.json, or eos_token_id in config.json"
        )
    return {
        "media_token_id": token_id(tokenizer, config.image_mark),
        "eoc_token_id": token_id(tokenizer, EOC),
        "answer_token_id": token_id(tokenizer, ANSWER),
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id,
    }
