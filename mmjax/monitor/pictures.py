"""Pictures of a batch as the model sees it: resized, packed, supervised tokens marked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _MARGIN, _LINE = 1024, 8, 17  # pixels
_LARGEST = 448  # a larger image is drawn smaller; its size stands beside it
_PADDING, _TEXT, _IMAGE, _TARGET = (236, 236, 236), (120, 130, 150), (88, 140, 220), (30, 160, 80)
_TARGET_PAPER = (198, 240, 208)


@dataclasses.dataclass(frozen=True)
class PackedImage:
    """An image found in a row. first: its first token; patches: int[rows, cols] of the row.

    Where a row of ``patches`` is a whole image, there is one number.
    """

    first: int
    patches: np.ndarray


def find_images(visual_index: np.ndarray, segment_ids: np.ndarray) -> list[PackedImage]:
    """Find the images in a row: runs of patch tokens of one length, one other token between.

    visual_index, segment_ids: int[t]. Two images side by side, of one width and with nothing but
    the last newline between them, are found as one taller image.
    """
    places = np.flatnonzero(visual_index >= 0)
    if not len(places):
        return []
    breaks = np.flatnonzero((np.diff(places) > 1) | (np.diff(segment_ids[places]) != 0)) + 1
    images: list[tuple[int, int, list[np.ndarray]]] = []  # first token, last token, patch rows
    for run in np.split(places, breaks):
        patches = visual_index[run]
        if images:
            first, last, rows = images[-1]
            same = segment_ids[first] == segment_ids[run[0]]
            if same and run[0] - last == 2 and len(rows[-1]) == len(run):
                images[-1] = (first, int(run[-1]), [*rows, patches])
                continue
        images.append((int(run[0]), int(run[-1]), [patches]))
    return [PackedImage(first, np.stack(rows)) for first, _, rows in images]


def find_media(visual_index: np.ndarray, segment_ids: np.ndarray) -> list[PackedImage]:
    """Find the images in a row whose every token points at the image that it looks at.

    visual_index, segment_ids: int[t]. An image is found once, where the first token points at it.
    """
    found: dict[int, PackedImage] = {}
    for place in np.flatnonzero((visual_index >= 0) & (segment_ids > 0)):
        number = int(visual_index[place])
        found.setdefault(number, PackedImage(int(place), np.array([[number]])))
    return list(found.values())


def draw_batch(
    batch: Mapping[str, np.ndarray],
    records: Sequence[Sequence[tuple[str, str]]],
    token_text: Callable[[int], str],
    *,
    max_rows: int = 4,
    picture: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Draw the first rows of a batch (see ``Batch`` in mmjax/types.py) into uint8[h,w,3].

    records: (source, id) of the samples of each row, in order. token_text: writes one token.
    picture: of a family whose rows of ``patches`` are whole images: makes uint8[h,w,3] of one.
    Each row shows a bar of its tokens (blue patches, grey text, green targets, light padding), and
    for each sample its images and its text, in which the supervised tokens lie on green.
    """
    rows = [
        _draw_row(batch, row, records[row] if row < len(records) else (), token_text, picture)
        for row in range(min(max_rows, len(batch["tokens"])))
    ]
    return np.concatenate(rows)


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Write uint8[h,w,3] as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


class _Sheet:
    """Paper that is as long as what is drawn on it: calls are kept, and made at the end."""

    def __init__(self):
        self.font = ImageFont.load_default(size=13)
        self.x, self.y = _MARGIN, _MARGIN
        self._calls: list[Callable[[Image.Image, ImageDraw.ImageDraw], None]] = []

    def new_line(self, height: int = _LINE) -> None:
        self.x, self.y = _MARGIN, self.y + height

    def text(self, text: str, paper: tuple[int, int, int] | None = None) -> None:
        """Write a word, on a new line if it has no room on this one."""
        width = math.ceil(self.font.getlength(text))
        if self.x + width > _WIDTH - _MARGIN and self.x > _MARGIN:
            self.new_line()
        x, y = self.x, self.y

        def call(_, draw):
            if paper:
                draw.rectangle((x, y, x + width, y + _LINE - 2), fill=paper)
            draw.text((x, y), text, fill=(20, 20, 20), font=self.font)

        self._calls.append(call)
        self.x += width

    def image(self, pixels: np.ndarray, height_so_far: int) -> int:
        """Put an image beside the last one, or below; returns the height of this line."""
        picture = Image.fromarray(pixels)
        picture.thumbnail((_LARGEST, _LARGEST))
        if self.x + picture.width > _WIDTH - _MARGIN and self.x > _MARGIN:
            self.new_line(height_so_far + _MARGIN)
            height_so_far = 0
        x, y = self.x, self.y
        self._calls.append(lambda paper, _: paper.paste(picture, (x, y)))
        self.x += picture.width + _MARGIN
        return max(height_so_far, picture.height)

    def bar(self, colours: np.ndarray, height: int = 10) -> None:
        """Draw uint8[t,3] as a bar over the whole width."""
        bar = Image.fromarray(np.repeat(colours[None], height, 0))
        bar = bar.resize((_WIDTH - 2 * _MARGIN, height), Image.Resampling.NEAREST)
        x, y = self.x, self.y
        self._calls.append(lambda paper, _: paper.paste(bar, (x, y)))
        self.new_line(height + _MARGIN)

    def pixels(self) -> np.ndarray:
        paper = Image.new("RGB", (_WIDTH, self.y + _LINE + _MARGIN), "white")
        draw = ImageDraw.Draw(paper)
        for call in self._calls:
            call(paper, draw)
        return np.asarray(paper)


def _draw_row(batch, row: int, records, token_text, picture) -> np.ndarray:
    """Draw one row of a batch."""
    tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
    visual, index = batch["visual_index"][row], batch["target_index"][row]
    targets = np.zeros(len(tokens), bool)
    targets[index[index > 0]] = True
    sheet, used = _Sheet(), int((segments > 0).sum())
    sheet.text(
        f"row {row}: {segments.max()} samples, {used} of {len(tokens)} tokens "
        f"({1 - used / len(tokens):.1%} padding), {targets.sum()} targets"
    )
    sheet.new_line()
    patches = batch["patches"][row]
    if picture is None:
        images, shown = find_images(visual, segments), visual >= 0
    else:  # a token that points at an image there is none of looks at no picture
        images = [i for i in find_media(visual, segments) if i.patches.max() < len(patches)]
        shown = np.isin(np.arange(len(tokens)), [i.first for i in images])
    kinds = np.select([segments == 0, targets, shown], [0, 3, 2], 1)
    sheet.bar(np.array([_PADDING, _TEXT, _IMAGE, _TARGET], np.uint8)[kinds])
    for segment in range(1, int(segments.max()) + 1):
        mine = [i for i in images if segments[i.first] == segment]
        pixels = [
            _pixels(patches, i.patches) if picture is None else picture(patches[i.patches[0, 0]])
            for i in mine
        ]
        source, name = records[segment - 1] if segment <= len(records) else ("", "")
        sizes = ", ".join("{1}x{0} patches".format(*i.patches.shape) for i in mine)
        if picture is not None:
            sizes = ", ".join("{1}x{0}".format(*p.shape) for p in pixels)
        sheet.text(f"{segment}: {source}/{name}  {sizes}")
        sheet.new_line()
        height = 0
        for one in pixels:
            height = sheet.image(one, height)
        if mine:
            sheet.new_line(height + 4)
        places = np.flatnonzero(segments == segment)
        _write_tokens(sheet, batch, row, places, [] if picture else mine, token_text)
        sheet.new_line(_LINE + _MARGIN)
    return sheet.pixels()


def _write_tokens(sheet: _Sheet, batch, row: int, places, images, token_text) -> None:
    """Write a sample's text tokens; an image of patches, with its newlines, is one mark."""
    tokens, visual = batch["tokens"][row], batch["visual_index"][row]
    targets, firsts = set(batch["target_index"][row].tolist()), {image.first for image in images}
    for at in places:
        if at in firsts:
            sheet.text("[image] ")
        # Of an image of patches neither those are written nor the newlines behind them.
        if not images or visual[max(at - 1, 0) : at + 1].max() < 0:
            sheet.text(token_text(int(tokens[at])), _TARGET_PAPER if at in targets else None)


def _pixels(patches: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Put patches [p, pixels] together by their numbers [rows, cols] into uint8[h,w,3]."""
    rows, cols = grid.shape
    channels = 3 if math.isqrt(patches.shape[-1] // 3) ** 2 * 3 == patches.shape[-1] else 1
    side = math.isqrt(patches.shape[-1] // channels)
    chosen = patches[grid.reshape(-1)]
    if chosen.dtype != np.uint8:  # normalised already: shown from its darkest to its brightest
        low, high = float(chosen.min()), float(chosen.max())
        chosen = np.uint8((chosen - low) / max(high - low, 1e-6) * 255)
    pixels = chosen.reshape(rows, cols, side, side, channels).transpose(0, 2, 1, 3, 4)
    pixels = pixels.reshape(rows * side, cols * side, channels)
    return np.ascontiguousarray(np.repeat(pixels, 3 // channels, -1))
