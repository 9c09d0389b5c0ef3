"""Small tokenizers made offline, for recipes that train from nothing.

They are laid out as Fuyu's own: SentencePiece Unigram with byte fallback, and the marks of the
stream as ordinary pieces. Ordinary, because transformers' FuyuProcessor tokenises the image
placeholders as text and drops the first id, counting on the underscore in front; an *added* token
would be cut out before the underscore is put there, and one patch would go missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

UNDERSCORE = "\u2581"
MARKS = ("|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|")


def build_word_tokenizer(words: Iterable[str], *, max_number: int = -1) -> Any:
    """Build a PreTrainedTokenizerFast whose pieces are whole words; the rest falls back to bytes.

    words: words or texts; words and punctuation are taken apart, the order decides the ids.
    max_number: adds the numbers 0..max_number as pieces, which box and point coordinates need.
    Ids: 0 <unk>, 1 <s>, 2 </s>, 3..258 the bytes, 259 |ENDOFTEXT|, 260 |SPEAKER|, 261 |NEWLINE|,
    then the words.
    """
    pieces: dict[str, None] = {UNDERSCORE: None}
    for text in words:
        for part in re.findall(r"\w+|[^\w\s]|\n", text):
            if re.fullmatch(r"\w+", part):
                pieces[UNDERSCORE + part] = None  # the word after a space
            pieces[part] = None
    pieces.update(dict.fromkeys(str(number) for number in range(max_number + 1)))
    # One price for every piece: the fewest pieces win, so whole words do.
    return build_unigram_tokenizer([(piece, -1.0) for piece in pieces])


def build_unigram_tokenizer(pieces: Sequence[tuple[str, float]]) -> Any:
    """Build a Fuyu-like PreTrainedTokenizerFast from (piece, log probability) pairs."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *MARKS]
    vocabulary = [(name, 0.0) for name in names]
    own = set(names)
    vocabulary += [(piece, score) for piece, score in pieces if piece not in own]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(UNDERSCORE), normalizers.Replace(" ", UNDERSCORE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(UNDERSCORE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="|ENDOFTEXT|",
        pad_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
