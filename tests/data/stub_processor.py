"""A processor small enough to check by eye: bytes as tokens, 2x2 patches of three channels."""

import numpy as np

from mmjax.data.images import load_rgb, pad_to_multiple, patchify
from mmjax.types import BadSample

SPECIAL = {"bos": 1, "answer": 2, "eos": 3}


class StubProcessor:
    """Image token 4; a byte c is token 10 + c."""

    def encode(self, segments, images, *, max_tokens=None):
        tokens, loss, visual, patches = [], [], [], []
        for segment in segments:
            if segment.kind == "image":
                new = patchify(pad_to_multiple(load_rgb(images[segment.value]), 2, 0), 2)
                ids = [4] * len(new)
                visual += range(len(patches), len(patches) + len(new))
                patches += list(new)
            elif segment.kind == "special":
                ids = [SPECIAL[segment.value]]
            else:
                ids = [10 + c for c in segment.value.encode()]
            tokens += ids
            loss += [segment.loss] * len(ids)
            visual += [-1] * (len(tokens) - len(visual))
        if max_tokens is not None and len(tokens) > max_tokens:
            raise BadSample("too_long", f"{len(tokens)} tokens, limit {max_tokens}")
        return {
            "tokens": np.array(tokens, np.int32),
            "positions": np.arange(len(tokens), dtype=np.int32),
            "loss_mask": np.array(loss, bool),
            "visual_index": np.array(visual, np.int32),
            "patches": np.array(patches, np.uint8).reshape(-1, 12),
        }


def text_of(tokens):
    """Return the bytes among the tokens as text."""
    return bytes(int(t) - 10 for t in tokens if t >= 10).decode()
