"""From a draw to an example: read a record, change it as training asks, lay it out, encode it.

Everything random is a function of (seed, source, record, epoch), each kind of draw apart from the
others: none of them moves when another is switched on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mmjax.data import limits
from mmjax.data.augment import Augment, Augments, augments_of, check_movable
from mmjax.data.mixture import Mixture, by_source
from mmjax.data.multiturn import Multiturn, draw_others, join, up_to
from mmjax.data.packing import BatchShape, Origin
from mmjax.data.resizing import (
    Resolutions,
    at_resolution,
    draw_resolution,
    list_resolutions,
    pixel_limit,
    squash_first,
)
from mmjax.data.skips import Skip
from mmjax.data.templates import (
    TEMPLATES,
    Template,
    fuyu_chat,
    fuyu_legacy_otter,
    get_template,
)
from mmjax.types import BadSample, Example, MMJaxError, Record

_MULTITURN, _AUGMENT, _PROCESSOR = 1, 2, 3  # kinds of draws


@dataclasses.dataclass(frozen=True)
class RecordOptions:
    """What is done with a record on its way to an example, in this order.

    multiturn: other records follow it, see ``mmjax.data.multiturn``. max_images: only its first
    ones are kept. resolutions: longest sides to draw from. augment: names of
    ``mmjax.data.augment``. too_long: what becomes of an example above ``seq_len``. legacy_otter:
    see ``legacy_loading``.
    """

    multiturn: Multiturn | None = None
    max_images: int | None = None
    resolutions: Resolutions | None = None
    augment: Augments = ()
    too_long: Literal["skip", "truncate"] = "skip"
    legacy_otter: bool = False

    def __post_init__(self) -> None:
        if self.max_images is not None and self.max_images < 1:
            raise MMJaxError(f"max_images is {self.max_images}; give 1 or more, or None for all")
        if self.too_long not in ("skip", "truncate"):
            raise MMJaxError(f"too_long is {self.too_long!r}; choose skip or truncate")

    def facts(self) -> dict[str, Any]:
        """Return the options as JSON, None for those that change nothing."""
        sides = list_resolutions(self.resolutions)
        augment = self.augment
        if isinstance(augment, Mapping):
            augment = {name: list(some) for name, some in augment.items()}
        return {
            "resolutions": None if sides is None else list(sides),
            "legacy_otter": self.legacy_otter,
            "multiturn": self.multiturn and dataclasses.asdict(self.multiturn),
            "max_images": self.max_images,
            "augment": (augment if isinstance(augment, dict) else list(augment)) or None,
            "too_long": None if self.too_long == "skip" else self.too_long,
        }


def make_loader(
    mixture: Mixture,
    template: str | Template | Mapping[str, str | Template],
    processor: Any,
    shape: BatchShape,
    seed: int = 0,
    options: RecordOptions = RecordOptions(),
) -> LoadExample:
    """Make what turns a draw into an example; arguments as in ``make_train_iterator``.

    Raises MMJaxError for a template that is not one for the processor's tokenizer or for a source,
    a resolution that is never shown, a seed below 0.
    """
    if seed < 0:
        raise MMJaxError(f"seed is {seed}; give a whole number from 0 up")
    sides = list_resolutions(options.resolutions)
    each = by_source("template", template, mixture.names)
    templates = tuple(get_template(one) for one in each)
    _check_documents(mixture, templates)
    resize = functools.partial(at_resolution, max_pixels=pixel_limit(processor))
    if options.legacy_otter:
        templates, (resize, *_) = zip(*(legacy_loading(t, sides) for t in templates), strict=True)
    augments = augments_of(options.augment, mixture.names)
    if (check := getattr(processor, "check_template", None)) is not None:
        for one in dict.fromkeys(templates):
            check(one)
    if (check := getattr(processor, "check_resolution", None)) is not None:
        for side in filter(None, sides or ()):
            check(side)
    return LoadExample(mixture, templates, processor, shape, seed, options, sides, resize, augments)


def _check_documents(mixture: Mixture, templates: Sequence[Template]) -> None:
    """Raise MMJaxError where a source of documents meets a template of ours that wants answers.

    Such a source names the one that lays its records out, ``TEMPLATE``; functions of others pass.
    """
    given = [getattr(template, "__name__", "") for template in templates]
    right = [
        getattr(source, "TEMPLATE", own) for source, own in zip(mixture.sources, given, strict=True)
    ]
    for name, own, wanted in zip(mixture.names, given, right, strict=True):
        if own != wanted and own in TEMPLATES:
            fix = wanted if len(set(right)) == 1 else dict(zip(mixture.names, right, strict=True))
            raise MMJaxError(
                f"source {name!r} holds documents, which have no answers, and template {own!r} "
                f"trains on answers: every one of them would be skipped; set data.template to "
                f"{fix!r}"
            )


def legacy_loading(
    template: Template, resolutions: tuple[int | None, ...] | None
) -> tuple[Template, Callable[[Record, int], Record]]:
    """Return the template and the resizing of OtterHD's own code, behind ``legacy_otter``.

    ``templates.fuyu_legacy_otter`` and ``resizing.squash_first`` say what they do and why. Raises
    MMJaxError where another template is asked for, or a size that is no square's.
    """
    if template is not fuyu_chat:
        raise MMJaxError(
            f"legacy_otter reproduces OtterHD's training, whose template is 'fuyu_chat', not "
            f"{getattr(template, '__name__', template)!r}; set template to it, or legacy_otter to "
            "False"
        )
    if not resolutions or None in resolutions:
        raise MMJaxError(
            f"legacy_otter squashes every picture to a square, and resolutions is {resolutions}; "
            "give its sides, such as (448, 512, 768)"
        )
    return fuyu_legacy_otter, squash_first


@dataclasses.dataclass(frozen=True)
class LoadExample:
    """Read a drawn record and make its example; a bad sample becomes a Skip, and travels on.

    templates, augments: of each source. resolutions: of ``list_resolutions``.
    """

    mixture: Mixture
    templates: tuple[Template, ...]
    processor: Any
    shape: BatchShape
    seed: int
    options: RecordOptions
    resolutions: tuple[int | None, ...] | None
    resize: Callable[[Record, int | None], Record]
    augments: tuple[tuple[Augment, ...], ...]

    def __call__(self, draw: tuple[int, int, int]) -> Example | Skip:
        source, index, _ = draw
        record = None
        try:
            record = self.mixture.sources[source][index]
            example, images = self._load(record, draw)
        except BadSample as error:
            meta = record.meta if record is not None else None
            return Skip.of(error, self.mixture.names[source], index, meta)
        name = str(record.meta.get("id", index))
        return {**example, "origin": Origin(source, self.mixture.names[source], name, images)}

    def _load(self, record: Record, draw: tuple[int, int, int]) -> tuple[Example, int]:
        """Return the example of a record and how many images it shows."""
        more = self.options.multiturn
        if more is not None:
            rng = self._rng(draw, _MULTITURN)
            others = draw_others(self.mixture, self.templates[draw[0]], more.turns, rng)
            records = up_to(record, others, more.max_images)
            try:
                found = self._together(records, draw, more.max_tokens)
                if found is not None:
                    return self._fitted(*found)
            except BadSample:
                pass  # one of the others, or too long together: the record is used by itself
        return self._fitted(*self._encode(record, draw, self._limit))

    @property
    def _limit(self) -> int | None:
        return None if self.options.too_long == "truncate" else self.shape.seq_len

    def _encode(
        self, record: Record, draw: tuple[int, int, int], max_tokens: int | None
    ) -> tuple[Record, Example]:
        """Return a record with its pictures changed, and what the processor makes of it."""
        if self.options.max_images is not None:
            record = limits.first_images(record, self.options.max_images)
        if self.resolutions:
            record = self.resize(record, draw_resolution(self.resolutions, self._rng(draw)))
        if self.augments[draw[0]]:
            check_movable(record)
            rng = self._rng(draw, _AUGMENT)
            for change in self.augments[draw[0]]:
                record = change(record, rng)
        segments = self.templates[draw[0]](record)
        processor = self.processor
        if (drawn := getattr(processor, "drawn", None)) is not None:
            processor = drawn(self._rng(draw, _PROCESSOR))
        return record, processor.encode(segments, record.images, max_tokens=max_tokens)

    def _fitted(self, record: Record, example: Example) -> tuple[Example, int]:
        """Return an example that fits into a row and its number of images; raises BadSample."""
        if self.options.too_long == "truncate":
            # A family that knows which token stands for an image cuts its examples itself.
            cut = getattr(self.processor, "truncate", limits.truncate)
            example = cut(example, self.shape.seq_len)
        self.shape.check(example)
        return example, len(record.images)

    def _together(
        self, records: list[Record], draw: tuple[int, int, int], budget: int | None
    ) -> tuple[Record, Example] | None:
        """Encode as many of the records, from the first on, as make no more than so many tokens.

        None where that is the first alone.
        """
        if len(records) == 1:
            return None
        if budget is None:
            return self._encode(join(records), draw, self._limit)

        def fits(count: int) -> tuple[Record, Example] | None:
            found = self._encode(join(records[:count]), draw, None)
            return found if len(found[1]["tokens"]) <= budget else None

        if (whole := fits(len(records))) is not None:  # mostly: pictures are then read once
            return whole
        low, high, best = 1, len(records) - 1, None
        while low < high:
            middle = (low + high + 1) // 2
            if (found := fits(middle)) is None:
                high = middle - 1
            else:
                low, best = middle, found
        return best

    def _rng(self, draw: tuple[int, int, int], *kind: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *draw, *kind))
