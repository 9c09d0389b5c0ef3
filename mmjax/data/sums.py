"""Sums in words: text alone, made as it is asked for, to try training without pictures."""

from __future__ import annotations

import numpy as np

from mmjax.types import Message, MMJaxError, Record

SPLITS = ("train", "test")
_TEST_SHARE = 0.2


class SumsSource:
    """Questions such as ``What is 7 plus 12?`` about whole numbers below ``limit``.

    split: a fifth of all pairs is kept for ``test``, the same whatever the seed of a run. size: by
    default every pair once. meta: ``answers``.
    """

    def __init__(self, split: str, *, limit: int = 20, size: int | None = None):
        if split not in SPLITS:
            raise MMJaxError(f"sums have no split {split!r}; they have {', '.join(SPLITS)}")
        if limit < 3:
            raise MMJaxError(f"sums below {limit} leave nothing to test with; raise limit to 3")
        pairs = np.random.default_rng(0).permutation(limit * limit)
        held_out = round(_TEST_SHARE * len(pairs))
        self.split, self.limit = split, limit
        self.pairs = pairs[:held_out] if split == "test" else pairs[held_out:]
        self.size = size or len(self.pairs)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"sums {self.split}: index {index} of {self.size}")
        a, b = map(int, divmod(self.pairs[index % len(self.pairs)], self.limit))
        messages = (Message("user", f"What is {a} plus {b}?"), Message("assistant", str(a + b)))
        meta = {"id": f"{self.split}/{index}", "source": f"sums/{self.split}", "line": index}
        return Record(messages, (), meta | {"answers": [str(a + b)]})
