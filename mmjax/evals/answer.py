"""Answers of a model to records: prompt, encode, generate, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmjax.data.resizing import at_resolution, pixel_limit
from mmjax.data.templates import get_template
from mmjax.generate.beam import Beams
from mmjax.loaded import LoadedModel
from mmjax.parallel.distributed import check_same_arrays
from mmjax.types import BadSample, MMJaxError, Record


def answerer(
    model: LoadedModel,
    *,
    template: str,
    batch_size: int,
    cache_dtype: str | None = None,
    beams: Beams = Beams(),  # noqa: B008
) -> Callable[[Sequence[Record], int | None, int], list[str | BadSample]]:
    """Return answer(records, resolution, max_new_tokens) -> texts, in the records' order.

    resolution: longest side in pixels that images are reduced to, or None. In the place of a record
    that cannot be read, or whose prompt leaves no positions for an answer, stands its BadSample: it
    counts as wrong, it is not left out. Several processes must all ask the same, and are told where
    they do not.
    cache_dtype, beams: see ``LoadedModel.generate_tokens``.
    """
    lay_out, limit = get_template(template), pixel_limit(model.processor)

    def answer(
        records: Sequence[Record], resolution: int | None, max_new_tokens: int
    ) -> list[str | BadSample]:
        answers: list[str | BadSample] = [""] * len(records)
        examples, kept, scales = [], [], []
        room = model.longest_prompt(max_new_tokens)
        if room is not None and room < 1:
            raise MMJaxError(
                f"max_new_tokens is {max_new_tokens}, and the model's table has "
                f"{model.config.decoder.longest} positions for prompt and answer; lower it"
            )
        for place, record in enumerate(records):
            try:
                record = at_resolution(record, resolution, max_pixels=limit)
                segments = lay_out(record)
                examples.append(model.processor.encode(segments, record.images, max_tokens=room))
                kept.append(place)
                scales.append(model.coordinate_scale(record.images))
            except BadSample as error:
                answers[place] = error
        arrays = (np.asarray(example[name]) for example in examples for name in sorted(example))
        check_same_arrays("some questions of the evaluation", arrays)
        tokens = model.generate_tokens(
            examples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            cache_dtype=cache_dtype,
            beams=beams,
        )
        for place, scale, row in zip(kept, scales, tokens, strict=True):
            answers[place] = model.processor.decode(row, scale).strip()
        return answers

    return answer
