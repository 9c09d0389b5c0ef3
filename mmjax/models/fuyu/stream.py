"""Fuyu's token stream: images row by row, and text with coordinates in it.

numpy only: data workers load this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmjax.data.tokenize import encode_text, need_tokenizer, supervised_tokens
from mmjax.data.turns import IMAGE_MARK
from mmjax.models.fuyu.coordinates import CoordinateTokens, split_coordinates
from mmjax.models.fuyu.image_plan import ImagePlan
from mmjax.models.fuyu.processor_config import ProcessorConfig
from mmjax.models.token_stream import TokenStream
from mmjax.types import MMJaxError, Segment


class FuyuStream(TokenStream):
    """A growing stream of Fuyu's.

    coordinates: of the tokenizer, None without one. scale: resized / original height of the image
    that coordinates mean, the last one before them.
    """

    def __init__(
        self,
        config: ProcessorConfig,
        tokenizer: Any | None,
        folder: str | None,
        coordinates: CoordinateTokens | None,
    ):
        super().__init__(tokenizer, folder)
        self._config, self._coordinates = config, coordinates
        self.scale = 1.0

    def image(self, plan: ImagePlan, first: int) -> None:
        """Add the rows of one image: cols patch tokens and a newline each.

        first: the row of the visual stream that holds its first patch.
        """
        ids = np.full((plan.rows, plan.cols + 1), self._config.image_token_id, np.int32)
        ids[:, -1] = self._config.newline_token_id
        visual = np.full(ids.shape, -1, np.int32)
        visual[:, :-1] = first + np.arange(plan.num_patches).reshape(plan.rows, plan.cols)
        self.add(ids, visual=visual.reshape(-1))
        self.scale = plan.scale

    def _close(self) -> None:
        """Add the run of text; coordinate tags cut it, and each part is tokenised by itself."""
        run, self._run = self._run, []
        text = "".join(part for part, _ in run)
        if not text:
            return
        tokenizer = need_tokenizer(self._tokenizer, self._folder)
        for span in split_coordinates(text):
            part = text[span.start : span.end]
            if span.kind is None:
                ids, spans = encode_text(tokenizer, part)
            else:
                ids = self._coordinates.encode(span, self.scale)
                spans = np.tile(np.int32([0, len(part)]), (len(ids), 1))
            self.add(ids, supervised_tokens(spans + span.start, run))


def prompt_segments(prompt: str, num_images: int) -> list[Segment]:
    """Split a string prompt into segments: images, ``bos`` before the first text, ``answer`` last.

    Raises MMJaxError when there are marks, but not one for each image.
    """
    parts = prompt.split(IMAGE_MARK)
    marks = len(parts) - 1
    if marks and marks != num_images:
        raise MMJaxError(
            f"the prompt holds {marks} {IMAGE_MARK} marks for {num_images} images; give one mark "
            "for each image, or none to put them all in front"
        )
    segments = [] if marks else [Segment("image", i) for i in range(num_images)]
    started = False
    for index, part in enumerate(parts):
        if index:
            segments.append(Segment("image", index - 1))
        if part and not started:
            segments.append(Segment("special", "bos"))
            started = True
        if part:
            segments.append(Segment("text", part))
    if not started:
        segments.append(Segment("special", "bos"))
    return [*segments, Segment("special", "answer")]
