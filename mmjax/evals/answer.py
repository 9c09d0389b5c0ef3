"""Answers of a model to records: prompt, encode, generate, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmjax.data.resizing import at_resolution
from mmjax.data.templates import get_template
from mmjax.loaded import LoadedModel
from mmjax.types import BadSample, Record


def answerer(
    model: LoadedModel, *, template: str, batch_size: int, cache_dtype: str | None = None
) -> Callable[[Sequence[Record], int | None, int], list[str | BadSample]]:
    """Return answer(records, resolution, max_new_tokens) -> texts, in the records' order.

    resolution: longest side in pixels that images are reduced to, or None. In the place of a record
    that cannot be read stands its BadSample: it counts as wrong, it is not left out.
    cache_dtype: see ``LoadedModel.generate``.
    """
    lay_out = get_template(template)

    def answer(
        records: Sequence[Record], resolution: int | None, max_new_tokens: int
    ) -> list[str | BadSample]:
        answers: list[str | BadSample] = [""] * len(records)
        examples, kept = [], []
        for place, record in enumerate(records):
            try:
                record = at_resolution(record, resolution)
                examples.append(model.processor.encode(lay_out(record), record.images))
                kept.append(place)
            except BadSample as error:
                answers[place] = error
        tokens = model.generate_tokens(
            examples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            cache_dtype=cache_dtype,
        )
        for place, row in zip(kept, tokens, strict=True):
            answers[place] = model.processor.decode(row).strip()
        return answers

    return answer
