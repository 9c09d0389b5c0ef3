"""Pictures of a batch: every image in its place, every supervised token on green."""

import numpy as np
from PIL import Image

from mmjax.data.images import pad_to_multiple, patchify
from mmjax.data.packing import BatchShape, pack
from mmjax.monitor import pictures

NEWLINE, PATCH = 3, 4


def example(images, text, targets):
    """Images in rows of patch tokens with a newline each, then text whose end is supervised."""
    tokens, visual, patches = [], [], []
    for pixels in images:
        first = sum(map(len, patches))
        patches.append(patchify(pad_to_multiple(pixels, PATCH, 0), PATCH))
        rows, cols = -(-pixels.shape[0] // PATCH), -(-pixels.shape[1] // PATCH)
        for row in range(rows):
            visual += [*range(first + row * cols, first + (row + 1) * cols), -1]
            tokens += [1] * cols + [NEWLINE]
    tokens, visual = tokens + list(text), visual + [-1] * len(text)
    mask = np.arange(len(tokens)) >= len(tokens) - targets
    return {
        "tokens": np.array(tokens, np.int32),
        "positions": np.arange(len(tokens), dtype=np.int32),
        "loss_mask": mask,
        "visual_index": np.array(visual, np.int32),
        "patches": np.concatenate(patches) if patches else np.zeros((0, 48), np.uint8),
    }


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


WIDE, TALL, SMALL = picture(8, 12, 0), picture(12, 8, 1), picture(4, 4, 2)
BATCH = pack(
    [example([WIDE, TALL], [50, 51, 60], 1), example([SMALL], [52, 61, 62], 2)],
    BatchShape(1, 40, 20, 8),
)


def test_images_are_found_in_a_packed_row():
    found = pictures.find_images(BATCH["visual_index"][0], BATCH["segment_ids"][0])
    assert [i.patches.shape for i in found] == [(2, 3), (3, 2), (1, 1)]
    assert [i.first for i in found] == [0, 8, 20]
    for image, pixels in zip(found, (WIDE, TALL, SMALL), strict=True):
        seen = pictures._pixels(BATCH["patches"][0], image.patches)
        np.testing.assert_array_equal(seen, pixels)
    assert pictures.find_images(np.full(5, -1), np.ones(5, int)) == []


def contains(sheet, part):
    """Tell whether a sheet shows these pixels somewhere."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, part.shape)
    corner = (sheet[: windows.shape[0], : windows.shape[1]] == part[0, 0]).all(-1)
    return any((windows[y, x, 0] == part).all() for y, x in zip(*np.nonzero(corner), strict=True))


def test_a_drawn_batch_shows_its_images_and_marks_what_is_supervised(tmp_path):
    written = []

    def token_text(token):
        written.append(token)
        return f"t{token} "

    records = [[("vqa", "a"), ("ocr", "b")]]
    sheet = pictures.draw_batch(BATCH, records, token_text)
    assert sheet.dtype == np.uint8 and sheet.shape[1:] == (1024, 3)
    assert written == [50, 51, 60, 52, 61, 62]  # text alone, sample by sample
    assert all(contains(sheet, pixels) for pixels in (WIDE, TALL, SMALL))
    plain = pictures.draw_batch(
        BATCH | {"target_index": np.full((1, 8), -1, np.int32)}, records, token_text
    )
    green = (sheet == pictures._TARGET_PAPER).all(-1).sum()
    assert green > 3 * 100 and not (plain == pictures._TARGET_PAPER).all(-1).any()
    bar = sheet[pictures._MARGIN + pictures._LINE + 4, 8:-8]
    shares = [(bar == c).all(-1).mean() for c in (pictures._IMAGE, pictures._TARGET)]
    # 13 patches and 3 targets of 40 tokens
    np.testing.assert_allclose(shares, [13 / 40, 3 / 40], atol=0.01)
    pictures.save_picture(tmp_path / "new" / "a.png", sheet)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), sheet)


def looking(images, tokens, targets):
    """Whole images, a row each, and text that points at the last one before it."""
    visual = np.cumsum(np.array(tokens) == MARK) - 1
    rows = [np.ascontiguousarray(pixels).reshape(-1) for pixels in images]
    return {
        "tokens": np.array(tokens, np.int32),
        "positions": np.arange(len(tokens), dtype=np.int32),
        "loss_mask": np.arange(len(tokens)) >= len(tokens) - targets,
        "visual_index": visual.astype(np.int32),
        "patches": np.stack(rows),
    }


MARK = 9


def test_an_image_that_many_tokens_look_at_is_drawn_once_where_the_first_does():
    one, two, three = (picture(8, 8, seed) for seed in range(3))
    batch = pack(
        [
            looking([one, two], [50, MARK, 51, 60, MARK, 52, 61], 1),
            looking([three], [MARK, 53, 62], 1),
        ],
        BatchShape(1, 16, 4, 4),
    )
    found = pictures.find_media(batch["visual_index"][0], batch["segment_ids"][0])
    assert [(i.first, int(i.patches[0, 0])) for i in found] == [(1, 0), (4, 1), (7, 2)]
    written, drawn = [], []

    def token_text(token):
        written.append(token)
        return f"t{token} "

    def draw(row):
        drawn.append(row)
        return row.reshape(8, 8, 3)

    sheet = pictures.draw_batch(batch, [[("a", "1"), ("b", "2")]], token_text, picture=draw)
    assert written == [50, MARK, 51, 60, MARK, 52, 61, MARK, 53, 62]  # the marks are tokens, too
    np.testing.assert_array_equal(drawn, [p.reshape(-1) for p in (one, two, three)])
    assert all(contains(sheet, pixels) for pixels in (one, two, three))
    bar = sheet[pictures._MARGIN + pictures._LINE + 4, 8:-8]
    assert abs((bar == pictures._IMAGE).all(-1).mean() - 3 / 16) < 0.01
    # Marks without an image: text points behind the last row.
    short = batch | {"patches": batch["patches"][:, :1]}
    drawn.clear()
    pictures.draw_batch(short, [[]], token_text, picture=draw)
    np.testing.assert_array_equal(drawn, [one.reshape(-1)])
