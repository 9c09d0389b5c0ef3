"""Answers of a model to records: prompt, encode, generate or rank, decode."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mmjax.data.resizing import at_resolution, pixel_limit
from mmjax.data.templates import answered, get_template
from mmjax.data.turns import Template, messages_before_answer
from mmjax.generate.beam import Beams
from mmjax.generate.likelihood import Continuations, continuations
from mmjax.loaded import LoadedModel
from mmjax.parallel.distributed import check_same_arrays
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

_QUESTIONS = "some questions of the evaluation"


@dataclasses.dataclass(frozen=True)
class Answerer:
    """Answers records with a model, in their order.

    template: lays a record out. batch_size: prompts that run at a time. cache_dtype, beams: see
    ``LoadedModel.generate_tokens``. In the place of a record that cannot be read, or whose prompt
    leaves no positions for an answer, stands its BadSample: it counts as wrong, it is not left out.
    Several processes must all ask the same, and are told where they do not.
    """

    model: LoadedModel
    template: str
    batch_size: int
    cache_dtype: str | None = None
    beams: Beams = Beams()  # noqa: RUF009

    def __call__(
        self, records: Sequence[Record], resolution: int | None, max_new_tokens: int
    ) -> list[str | BadSample]:
        """Let the model write so many tokens at most.

        resolution: longest side in pixels that images are reduced to, or None.
        """
        model = self.model
        answers: list[str | BadSample] = [""] * len(records)
        examples, kept, scales = [], [], []
        room = self._room(max_new_tokens)
        for place, record in enumerate(records):
            try:
                record = at_resolution(record, resolution, max_pixels=self._limit)
                segments = self._lay_out(record)
                examples.append(model.processor.encode(segments, record.images, max_tokens=room))
                kept.append(place)
                scales.append(model.coordinate_scale(record.images))
            except BadSample as error:
                answers[place] = error
        arrays = (np.asarray(example[name]) for example in examples for name in sorted(example))
        check_same_arrays(_QUESTIONS, arrays)
        tokens = model.generate_tokens(
            examples,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            cache_dtype=self.cache_dtype,
            beams=self.beams,
        )
        for place, scale, row in zip(kept, scales, tokens, strict=True):
            answers[place] = model.processor.decode(row, scale).strip()
        return answers

    def rank(
        self,
        records: Sequence[Record],
        options: Sequence[Sequence[str]],
        resolution: int | None,
        *,
        mean: bool = False,
    ) -> list[list[float] | BadSample]:
        """Return the log-likelihood of each option behind its record's prompt.

        An option stands there as an answer does in training, with the space that a template puts
        before it; the end token behind it does not count. mean: over its tokens, in place of their
        sum, so that a longer option loses nothing by its length. Raises MMJaxError for a template
        that does not tell how an answer stands behind it.
        """
        answers: list[list[float] | BadSample] = [[] for _ in records]
        asked: list[Continuations] = []
        kept: list[int] = []
        for place, (record, texts) in enumerate(zip(records, options, strict=True)):
            try:
                record = at_resolution(record, resolution, max_pixels=self._limit)
                asked.append(self._continuations(record, texts))
                kept.append(place)
            except BadSample as error:
                answers[place] = error
        arrays = (np.asarray(one.prompt[name]) for one in asked for name in sorted(one.prompt))
        behind = (tokens for one in asked for tokens in one.tokens)
        check_same_arrays(_QUESTIONS, itertools.chain(arrays, behind))
        found = self.model.log_likelihoods(
            asked, batch_size=self.batch_size, cache_dtype=self.cache_dtype
        )
        for place, one, values in zip(kept, asked, found, strict=True):
            answers[place] = (values / one.counts if mean else values).tolist()
        return answers

    def _continuations(self, record: Record, options: Sequence[str]) -> Continuations:
        room = self._room(1)  # the last token of an answer is not read
        asked, lay_out = messages_before_answer(record), answered(self.template)
        examples, patches = [], None
        for option in options:
            whole = dataclasses.replace(record, messages=(*asked, Message("assistant", option)))
            segments = _last_answer_alone(lay_out(whole))
            examples.append(
                self.model.processor.encode(
                    segments, record.images, max_tokens=room, patches=patches
                )
            )
            patches = examples[0]["patches"]  # the pictures are read for one of them
        return continuations(examples)

    def _room(self, new: int) -> int | None:
        """Return the most tokens of a prompt beside ``new`` ones, None for any number."""
        room = self.model.longest_prompt(new)
        if room is not None and room < 1:
            raise MMJaxError(
                f"max_new_tokens is {new}, and the model's table has "
                f"{self.model.config.decoder.longest} positions for prompt and answer; lower it"
            )
        return room

    @cached_property
    def _lay_out(self) -> Template:
        return get_template(self.template)

    @cached_property
    def _limit(self) -> int | None:
        return pixel_limit(self.model.processor)


def _last_answer_alone(segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments up to the end of the last answer's text, which alone is a target."""
    begin = end = max(i for i, one in enumerate(segments) if one.loss and one.kind == "text")
    while segments[begin - 1].loss and begin:
        begin -= 1
    before = (dataclasses.replace(one, loss=False) for one in segments[:begin])
    return [*before, *segments[begin : end + 1]]
