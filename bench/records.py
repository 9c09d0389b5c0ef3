"""Synthetic records: a LLaVA file of conversations and the JPEG pictures it names, seeded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_QUALITY = 90
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
WORDS = tuple(a + b for a in _SYLLABLES[::3] for b in _SYLLABLES)
"""Every word of the conversations: 1,680 of two syllables."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the records are: longest sides, and words of questions and answers, uniform."""

    sides: tuple[int, int] = (224, 1024)
    question: tuple[int, int] = (5, 25)
    answer: tuple[int, int] = (5, 80)


QUICK = Sizes(sides=(40, 150), question=(2, 5), answer=(2, 8))


def write(folder: Path, records: int, pictures: int, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """Write ``records.json`` and ``pictures/``; returns what was drawn, for the row.

    Pictures are cut from a few canvases at random places, three in five lying; the shorter side is
    half to all of the longer one. Every record names one of them, drawn at random.
    """
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    canvases = [_canvas(rng, 2 * sizes.sides[1]) for _ in range(4)]
    pixels = nbytes = 0
    for number in range(pictures):
        longer = int(rng.integers(sizes.sides[0], sizes.sides[1] + 1))
        size = [longer, max(1, int(longer * rng.uniform(0.5, 1)))]
        width, height = size if rng.random() < 0.6 else size[::-1]
        canvas = canvases[number % len(canvases)]
        left, top = (int(rng.integers(0, canvas.width - side)) for side in (width, height))
        file = folder / "pictures" / f"{number}.jpg"
        canvas.crop((left, top, left + width, top + height)).save(file, quality=_QUALITY)
        pixels += width * height
        nbytes += file.stat().st_size
    drawn = [_record(rng, number, pictures, sizes) for number in range(records)]
    (folder / "records.json").write_text(json.dumps(drawn))
    return {
        "records": records,
        "pictures": pictures,
        "sides": list(sizes.sides),
        "megapixels": round(pixels / pictures / 1e6, 3),
        "bits_per_pixel": round(8 * nbytes / pixels, 2),
    }


def _record(rng: np.random.Generator, number: int, pictures: int, sizes: Sizes) -> dict[str, Any]:
    def text(bounds: tuple[int, int]) -> str:
        return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(*bounds)))

    question, answer = text(sizes.question), text(sizes.answer)
    return {
        "id": str(number),
        "image": f"pictures/{rng.integers(pictures)}.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def _canvas(rng: np.random.Generator, side: int) -> Image.Image:
    """Make a picture with structure of every size, as photographs have, and a little grain."""
    levels = np.full((side, side, 3), 128, np.float32)
    cells = 4
    while cells <= side // 4:
        coarse = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        fine = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        levels += (np.asarray(fine, np.float32) - 128) * (2 / cells**0.5)
        cells *= 2
    levels += rng.normal(0, 5, (side, side, 1)).astype(np.float32)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
