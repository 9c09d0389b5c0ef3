"""Emoji with their names, in Google's and in Twitter's drawings: pictures with captions.

    python -m mmjax.data.emoji      # fetch 25 MB from registry.npmjs.org, once

From the npm package emoji-datasource 16.0.0 (MIT; Google's drawings Apache-2.0, Twitter's CC BY
4.0). 1,911 emoji of 32 x 32 pixels; of the package's four sheets these two alone are unpacked.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import sys
import tarfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmjax import user_cache
from mmjax.types import Message, MMJaxError, Record

URL = "https://registry.npmjs.org/emoji-datasource/-/emoji-datasource-16.0.0.tgz"
SHA512 = "/qHKqK5Nr3+8zhgO6kHmF43Fm5C8HNn0AaFRIpgw8HF3+uF0Vfc8jgLI1ZQS5ba1vBzksS8NBCjHejwLb2D/Sg=="
STYLES = ("google", "twitter")
SIZE, _PITCH = 32, 34  # pixels of an emoji, and from one to the next on a sheet
_MEMBERS = ("LICENSE", "emoji.json", *(f"img/{style}/sheets/32.png" for style in STYLES))


class EmojiSource:
    """Emoji and their names in one style; images are uint8[32, 32, 3] arrays.

    style: whose drawings, ``google`` or ``twitter``. categories: of the package, such as ``Flags``
    or ``Food & Drink``; None for all. variants: how many times each emoji is drawn; beyond 1 each
    has a size, a place, a brightness and a background of its own, a function of (seed, index).
    folder: where ``python -m mmjax.data.emoji`` put the files.
    meta: ``answers`` (the name in lower case), ``group`` (the category).
    Raises MMJaxError when the files are not there, or for an unknown style or category.
    """

    def __init__(
        self,
        style: str,
        *,
        categories: Sequence[str] | None = None,
        variants: int = 1,
        seed: int = 0,
        folder: str | os.PathLike | None = None,
    ):
        if style not in STYLES or variants < 1:
            raise MMJaxError(
                f"emoji style {style!r}, variants {variants}: the style is one of "
                f"{', '.join(STYLES)}, and variants is at least 1"
            )
        self.style, self.variants, self.seed = style, variants, seed
        self.folder = os.fspath(folder or default_folder())
        self.categories = None if categories is None else tuple(categories)
        known = {entry["category"] for entry in _names(self.folder)}
        if unknown := sorted(set(self.categories or ()) - known):
            raise MMJaxError(f"emoji category {unknown[0]!r} is unknown; one of {sorted(known)}")

    def __len__(self) -> int:
        return len(_kept(self.folder, self.categories)) * self.variants

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"emoji {self.style}: index {index} of {len(self)}")
        entries = _kept(self.folder, self.categories)
        entry = entries[index % len(entries)]
        drawing = _drawing(self.folder, self.style, entry["sheet_x"], entry["sheet_y"])
        rng = np.random.default_rng((self.seed, index)) if self.variants > 1 else None
        name = caption(entry)
        meta = {
            "id": f"{entry['unified']}/{index // len(entries)}",
            "source": f"emoji/{self.style}",
            "answers": [name],
            "group": entry["category"],
        }
        messages = (Message("user", "<image>What is this?"), Message("assistant", name))
        return Record(messages, (paint(drawing, rng),), meta)


def caption(entry: dict) -> str:
    """Return an emoji's name in lower case."""
    return entry["name"].lower().replace("\u201c", '"').replace("\u201d", '"')


def captions(
    categories: Sequence[str] | None = None, folder: str | os.PathLike | None = None
) -> list[str]:
    """Return every name of some categories, for a tokenizer of their words."""
    kept = _kept(os.fspath(folder or default_folder()), None if not categories else (*categories,))
    return [caption(entry) for entry in kept]


def paint(drawing: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Lay a drawing, uint8[32, 32, 4], onto a background: white, or as the generator decides."""
    if rng is None:
        paper = np.full((SIZE, SIZE, 3), 255, np.float32)
        return _over(drawing, paper)
    paper = np.empty((SIZE, SIZE, 3), np.float32)
    paper[:] = 255 if rng.random() < 0.5 else rng.integers(128, 256, 3)
    side = int(rng.integers(24, SIZE + 1))
    small = np.asarray(Image.fromarray(drawing).resize((side, side), Image.Resampling.BICUBIC))
    placed = np.zeros_like(drawing)
    top, left = rng.integers(SIZE - side + 1, size=2)
    placed[top : top + side, left : left + side] = small
    lit = placed.astype(np.float32)
    lit[..., :3] *= rng.uniform(0.8, 1.1) * rng.uniform(0.92, 1.08, 3)
    return _over(np.clip(lit, 0, 255), paper)


def _over(drawing: np.ndarray, paper: np.ndarray) -> np.ndarray:
    alpha = drawing[..., 3:].astype(np.float32) / 255
    mixed = drawing[..., :3] * alpha + paper * (1 - alpha)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def default_folder() -> Path:
    """Return where the files lie: $MMJAX_EMOJI, or a folder of the user's cache."""
    return Path(os.environ.get("MMJAX_EMOJI") or user_cache.folder("emoji-datasource-16.0.0"))


def fetch(folder: Path, url: str = URL) -> None:
    """Download the package, check its SHA-512 and unpack two sheets and the names."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        data = answer.read()
    unpack(data, folder)


def unpack(data: bytes, folder: Path, sha512: str = SHA512) -> None:
    """Unpack the package's bytes; raises MMJaxError when they are not those of version 16.0.0."""
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != sha512:
        raise MMJaxError(
            f"{len(data)} bytes with SHA-512 {found[:12]}... instead of {sha512[:12]}...: not "
            "emoji-datasource 16.0.0; fetch it again"
        )
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for name in (*_MEMBERS[:1], *_MEMBERS[2:], _MEMBERS[1]):  # the names last: they mean whole
            content = archive.extractfile(f"package/{name}").read()
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            part.write_bytes(content)
            part.replace(target)


@functools.lru_cache(maxsize=4)
def _names(folder: str) -> tuple[dict, ...]:
    file = Path(folder) / "emoji.json"
    if not file.is_file():
        raise MMJaxError(f"{file} is missing; fetch it with `python -m mmjax.data.emoji`")
    entries = json.loads(file.read_text("utf-8"))
    return tuple(e for e in entries if all(e[f"has_img_{style}"] for style in STYLES))


@functools.lru_cache(maxsize=16)
def _kept(folder: str, categories: tuple[str, ...] | None) -> tuple[dict, ...]:
    return tuple(e for e in _names(folder) if not categories or e["category"] in categories)


@functools.lru_cache(maxsize=4)
def _sheet(folder: str, style: str) -> np.ndarray:
    with Image.open(Path(folder) / f"img/{style}/sheets/32.png") as image:
        return np.asarray(image.convert("RGBA"))


def _drawing(folder: str, style: str, column: int, row: int) -> np.ndarray:
    left, top = column * _PITCH + 1, row * _PITCH + 1
    return _sheet(folder, style)[top : top + SIZE, left : left + SIZE]


def main(argv: list[str] | None = None) -> None:
    from mmjax.cli import Parser

    parser = Parser("mmjax.data.emoji", __doc__)
    where = "where they are kept (default %(default)s)"
    parser.add_argument("--folder", type=Path, default=default_folder(), help=where)
    folder = parser.read(argv).folder
    if not (folder / "emoji.json").is_file():
        fetch(folder)
    print(f"{folder}: {len(_names(os.fspath(folder)))} emoji in {len(STYLES)} styles")


if __name__ == "__main__":
    from mmjax.cli import run_guarded

    sys.exit(run_guarded(main))
