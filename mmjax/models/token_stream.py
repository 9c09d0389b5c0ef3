"""The token stream that processors build, piece by piece, and the samples that none can use.

numpy only: processors are built on this.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data.tokenize import encode_text, need_tokenizer, supervised_tokens
from mmjax.types import BadSample, Example, MMJaxError, Segment


class TokenStream:
    """A growing stream: pieces of ids, of targets and of rows of the visual stream.

    tokenizer, folder: for ``text`` alone; neighbouring texts are tokenised as one string.
    """

    def __init__(self, tokenizer: Any | None = None, folder: str | None = None):
        self._tokenizer, self._folder = tokenizer, folder
        self._ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        self._loss: list[np.ndarray] = [np.zeros(0, bool)]
        self._visual: list[np.ndarray] = [np.zeros(0, np.int32)]
        self._run: list[tuple[str, bool]] = []

    def text(self, text: str, loss: bool = False) -> None:
        """Add text; loss: whether its tokens are targets."""
        self._run.append((text, loss))

    def add(self, ids: Any, loss: Any = False, visual: Any = -1) -> None:
        """Add ids as they are; loss and visual: one for each of them, or one for all."""
        self._close()
        ids = np.asarray(ids, np.int32).reshape(-1)
        self._ids.append(ids)
        # np.full, not broadcast_to: this runs for every piece of every sample.
        self._loss.append(np.full(len(ids), loss, bool) if np.ndim(loss) == 0 else loss)
        self._visual.append(np.full(len(ids), visual, np.int32) if np.ndim(visual) == 0 else visual)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens int32[t], targets bool[t] and visual rows int32[t]."""
        self._close()
        return tuple(map(np.concatenate, (self._ids, self._loss, self._visual)))

    def _close(self) -> None:
        if not self._run:
            return
        tokenizer = need_tokenizer(self._tokenizer, self._folder)
        run, self._run = self._run, []
        ids, spans = encode_text(tokenizer, "".join(part for part, _ in run))
        self.add(ids, supervised_tokens(spans, run))


def make_example(
    tokens: np.ndarray, loss: np.ndarray, visual: np.ndarray, rows: np.ndarray
) -> Example:
    """Return the Example of one prompt; its fields are explained in ``mmjax.types``."""
    return {
        "tokens": tokens,
        "positions": np.arange(len(tokens), dtype=np.int32),
        "loss_mask": loss,
        "visual_index": visual,
        "patches": rows,
    }


def token_array(prompt: Any) -> np.ndarray:
    """Take a prompt of token ids: int32[t]; raises MMJaxError where they are no integers."""
    tokens = np.asarray(prompt).reshape(-1)
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise MMJaxError(f"a prompt is a string or integer token ids, not {tokens.dtype}")
    return tokens.astype(np.int32)


def check_answers(segments: Sequence[Segment], *, bare_end: bool = False) -> None:
    """Refuse supervised stretches that hold no text: they would train the end mark alone.

    bare_end: an end mark that closes a text which is no target is meant so
    (``fuyu_legacy_otter``). Raises BadSample ``empty_answer``.
    """
    stretch: list[Segment] = []
    before: Segment | None = None
    for segment in [*segments, None]:
        if segment is not None and segment.loss:
            stretch.append(segment)
            continue
        texts = [str(s.value) for s in stretch if s.kind == "text"]
        meant = bare_end and not texts and before is not None and before.kind == "text"
        if stretch and not meant and not any(map(_is_seen, "".join(texts))):
            raise BadSample("empty_answer", "an answer is empty; drop the record or fill it in")
        stretch, before = [], segment


def _is_seen(letter: str) -> bool:
    """Tell a letter from white space and from what has no shape, as a zero-width space."""
    return not letter.isspace() and unicodedata.category(letter) not in ("Cc", "Cf")


def check_targets(segments: Sequence[Segment], loss: np.ndarray) -> None:
    """Raise BadSample ``empty_answer`` where something is supervised and no token is a target."""
    if any(s.loss for s in segments) and not loss.any():
        raise BadSample("empty_answer", "no token lies inside the supervised text")


def check_ends(
    segments: Sequence[Segment],
    tokens: np.ndarray,
    loss: np.ndarray,
    ends: Mapping[str, int | None],
) -> None:
    """Refuse a supervised text that itself holds a token which ends an answer.

    A model would learn to stop there, and to go on. ends: special segment -> its id. Raises
    BadSample ``end_mark``.
    """
    own = sum(s.loss and s.kind == "special" and s.value in ends for s in segments)
    ids = [i for i in ends.values() if i is not None]
    targets = tokens[loss]
    # Not np.isin, which sorts: this runs for every sample.
    found = sum(np.count_nonzero(targets == i) for i in set(ids))
    if found > own:
        raise BadSample(
            "end_mark",
            f"an answer itself holds a token that ends it (id {' or '.join(map(str, ids))}); take "
            "it out of the record",
        )


def check_length(length: int, limit: int | None) -> None:
    """Raise BadSample ``too_long`` above a limit of tokens."""
    if limit is not None and length > limit:
        raise BadSample(
            "too_long",
            f"the sample makes {length} tokens, above max_tokens = {limit} (data.seq_len of a "
            "run); shorten the text or raise max_tokens",
        )


def image_order(segments: Sequence[Segment], images: int) -> list[int]:
    """Return which image each image segment shows; raises BadSample unless each one once."""
    order = [int(s.value) for s in segments if s.kind == "image"]
    if sorted(order) != list(range(images)):
        raise mismatch("template", len(order), images)
    return order


def mismatch(what: str, marks: int, images: int) -> BadSample:
    """Return the error that says how marks and images differ, and what to do."""
    return BadSample(
        "image_mismatch",
        f"the {what} holds {marks} <image> mark(s) and there are {images} image(s): "
        + ("more marks than images" if marks > images else "images without marks")
        + "; give one mark for each image, where it stands, and one image for each mark",
    )
