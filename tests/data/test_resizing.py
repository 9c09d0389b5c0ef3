"""Sizes drawn for a sample, sizes that fit a budget, and OtterHD's squares."""

import io

import numpy as np
import pytest
from PIL import Image
from stub_processor import StubProcessor

from mmjax.data import images
from mmjax.data.augment import flip_at_random
from mmjax.data.pipeline import make_train_iterator
from mmjax.data.resizing import (
    at_resolution,
    draw_resolution,
    list_resolutions,
    pad_at_random,
    pixel_limit,
    size_at,
    squash_first,
)
from mmjax.models.fuyu.image_plan import grid, largest_within
from mmjax.models.fuyu.processor import FuyuProcessor, ProcessorConfig
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

RANGE = {"min": 224, "max": 1024, "multiple": 32}


def picture(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def record(*pictures, question="What?"):
    return Record((Message("user", question), Message("assistant", "This.")), pictures)


def shapes(one):
    return [np.shape(image)[:2] for image in one.images]


def png(width, height):
    stream = io.BytesIO()
    Image.new("L", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def test_a_range_is_every_multiple_in_it():
    sides = list_resolutions(RANGE)
    assert sides == tuple(range(224, 1025, 32)) and len(sides) == 26
    assert list_resolutions({"min": 5, "max": 7}) == (5, 6, 7)
    assert list_resolutions({"min": 30, "max": 95, "multiple": 30}) == (30, 60, 90)
    assert list_resolutions((448, None, 448)) == (448, None, 448)
    assert list_resolutions(None) is None and list_resolutions(()) is None


def test_every_side_of_a_range_is_drawn_and_depends_on_the_generator_alone():
    sides = list_resolutions(RANGE)
    drawn = [draw_resolution(sides, np.random.default_rng((7, 0, i, 0))) for i in range(2600)]
    counts = [drawn.count(side) for side in sides]
    assert min(counts) > 60 and max(counts) < 150
    again = [draw_resolution(sides, np.random.default_rng((7, 0, i, 0))) for i in range(20)]
    assert again == drawn[:20]


@pytest.mark.parametrize(
    "wrong, says",
    [
        ((96, 0), r"resolutions \(96, 0\): 0 is not a number of pixels"),
        ((True,), "True is not a number"),
        ((96.0,), "96.0 is not a number"),
        ({"min": 10}, "look at 'max'"),
        ({"min": 10, "max": 20, "step": 5}, "look at 'step'"),
        ({"min": 10, "max": 20, "multiple": 0}, "multiple = 0 is not a number"),
        ({"min": 90, "max": 80}, "no multiple of 1 lies from 90 to 80"),
        ({"min": 33, "max": 60, "multiple": 32}, "no multiple of 32 lies from 33 to 60"),
    ],
)
def test_wrong_resolutions_are_named(wrong, says):
    with pytest.raises(MMJaxError, match=says):
        list_resolutions(wrong)


@pytest.mark.parametrize(
    "size, longest, want",
    [
        ((640, 480), 448, (448, 336)),
        ((480, 640), 448, (336, 448)),
        ((1003, 1000), 448, (448, 446)),
        ((10_000, 3), 1000, (1000, 1)),
        ((300, 200), 448, (300, 200)),
    ],
)
def test_the_longest_side_is_exact_and_nothing_is_enlarged(size, longest, want):
    assert size_at(*size, longest) == want
    assert shapes(at_resolution(record(picture(*size)), longest)) == [want[::-1]]


def test_only_a_call_by_name_enlarges():
    small = record(picture(30, 20), png(6, 8))
    assert at_resolution(small, 60).images is not small.images
    assert at_resolution(small, 60).images[0] is small.images[0]
    assert at_resolution(small, 60).images[1] is small.images[1]
    assert shapes(at_resolution(small, 60, enlarge=True)) == [(40, 60), (60, 45)]
    flat = record(np.full((8, 8, 3), 9, np.uint8))
    assert (np.asarray(at_resolution(flat, 20, enlarge=True).images[0]) == 9).all()


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    bomb = record(png(10_000, 9_000))  # 90 million pixels in a few kilobytes
    assert len(bomb.images[0]) < 100_000
    monkeypatch.setattr(images, "to_rgb", lambda *_: pytest.fail("decoded"))
    for resize in (at_resolution, squash_first):
        with pytest.raises(BadSample, match="above the limit of 89478485") as error:
            resize(bomb, 448)
        assert error.value.reason == "image_too_large"
    with pytest.raises(BadSample, match="enlarged to 20000x20000"):
        at_resolution(record(picture(4, 4)), 20_000, enlarge=True)


@pytest.mark.parametrize(
    "size", [(640, 480), (97, 1009), (3000, 9), (9, 3000), (5000, 1), (1, 1), (31, 30), (30, 31)]
)
@pytest.mark.parametrize("patch", [8, 30])
def test_a_token_budget_takes_the_largest_grid_that_fits(size, patch):
    """Against every size of the aspect, one pixel of the longer side at a time."""

    def tokens(width, height):
        rows, cols = grid(width, height, patch)
        return rows * (cols + 1)

    longer = max(size)
    steps = [tuple(max(1, side * n // longer) for side in size) for n in range(1, longer + 1)]
    for budget in (2, 3, 7, 30, 240, 1260):
        got = largest_within(*size, patch, budget)
        assert tokens(*got) <= budget
        fitting = [s for s in steps if tokens(*s) <= budget]
        assert tokens(*got) == tokens(*fitting[-1])
        assert grid(*got, patch) == grid(*fitting[-1], patch)


def test_a_budget_holds_behind_any_drawn_resolution():
    processor = FuyuProcessor(ProcessorConfig(patch_size=8, max_image_tokens=50))
    for side in (16, 40, 96, 200):
        for size in ((200, 200), (200, 10), (10, 200)):
            one = at_resolution(record(picture(*size)), side)
            example = processor.encode([Segment("image", 0)], one.images)
            assert len(example["tokens"]) <= 50
            assert len(example["tokens"]) == processor.image_tokens(*size_at(*size, side))


def test_a_legacy_square_is_pillows_own_bicubic():
    one = record(picture(37, 21), picture(5, 5, seed=1))
    got = squash_first(one, 28)
    want = Image.fromarray(one.images[0]).resize((28, 28), Image.Resampling.BICUBIC)
    assert len(got.images) == 1 and got.messages == one.messages
    np.testing.assert_array_equal(got.images[0], np.asarray(want))
    kept = at_resolution(one, 28)
    assert shapes(got) == [(28, 28)] and shapes(kept) == [(15, 28), (5, 5)]  # both on one sample
    assert shapes(squash_first(record(picture(4, 6)), 28)) == [(28, 28)]  # enlarged, too


def test_a_legacy_record_without_a_picture_gets_a_black_one():
    got = squash_first(record(), 16)
    assert shapes(got) == [(16, 16)] and not got.images[0].any()


def test_legacy_marks_go_with_the_images():
    one = record(picture(4, 4), picture(4, 4), question="<image>\nIs it <image> this?")
    assert squash_first(one, 8).messages[0].text == "Is it  this?"
    short = record(picture(4, 4), question="<image> and <image>")
    assert squash_first(short, 8).messages == short.messages  # the template refuses it


class Wide:
    """Records of one picture, 40 x 20, each with its own number for an answer."""

    def __len__(self):
        return 30

    def __getitem__(self, i):
        messages = (Message("user", "#q"), Message("assistant", f"{i}"))
        return Record(messages, (picture(40, 20, seed=i),), {"id": str(i)})


def grids(**options):
    shape = dict(seq_len=600, max_patches=450, max_targets=8, batch_size=1, pack=False, prefetch=0)
    batches = make_train_iterator(Wide(), "fuyu_chat", StubProcessor(), **(shape | options))
    return [int((batch["visual_index"] >= 0).sum()) for batch in batches]


def test_a_range_draws_for_every_sample_anew_each_epoch():
    resolutions = {"min": 8, "max": 40, "multiple": 4}
    once = grids(resolutions=resolutions, epochs=2)
    # Half as high as wide, in patches of 2x2, a row or column that is cut off padded up.
    possible = {s // 2 * -(-(s // 2) // 2) for s in range(8, 41, 4)}
    assert set(once) <= possible and len(set(once)) > 5
    assert grids(resolutions=resolutions, epochs=2) == once
    assert sorted(once[:30]) != sorted(once[30:])
    assert grids(resolutions=resolutions, epochs=2, seed=1) != once


def test_the_legacy_switch_squashes_in_the_pipeline():
    assert set(grids(resolutions=(8, 16), epochs=1)) == {4 * 2, 8 * 4}
    squashed = grids(resolutions=(8, 16), epochs=1, legacy_otter=True)
    assert set(squashed) == {4 * 4, 8 * 8}


@pytest.mark.parametrize("resolutions", [None, (448, None)])
def test_the_legacy_switch_needs_squares(resolutions):
    with pytest.raises(MMJaxError, match=r"give its sides, such as \(448, 512, 768\)"):
        grids(resolutions=resolutions, legacy_otter=True)


def test_the_legacy_switch_belongs_to_one_template():
    with pytest.raises(MMJaxError, match="whose template is 'fuyu_chat', not 'plain'"):
        make_train_iterator(
            Wide(), "plain", StubProcessor(), resolutions=(8,), legacy_otter=True,
            seq_len=60, max_patches=45, max_targets=8, batch_size=1,
        )  # fmt: skip


def test_half_of_the_images_become_squares_of_random_colours():
    one = record(*[picture(4, 2)] * 400)
    padded = pad_at_random(one, np.random.default_rng(3))
    squares = [image for image in padded.images if image.shape == (4, 4, 3)]
    assert 150 < len(squares) < 250
    assert len({tuple(square[0, 0]) for square in squares}) > 100
    np.testing.assert_array_equal(squares[0][1:3], picture(4, 2))
    assert all(image is picture_ for image, picture_ in zip(padded.images, one.images, strict=True)
               if image.shape == (2, 4, 3))  # fmt: skip
    again = pad_at_random(one, np.random.default_rng(3))
    assert all((a == b).all() for a, b in zip(padded.images, again.images, strict=True))
    assert pad_at_random(one, np.random.default_rng(3), share=0).images == one.images


def test_the_frames_of_a_video_change_together():
    video = record([picture(40, 20), picture(40, 20, 1)])
    frames = at_resolution(video, 10).images[0]
    assert [np.shape(frame) for frame in frames] == [(5, 10, 3)] * 2
    frames = pad_at_random(video, np.random.default_rng(0), share=1).images[0]
    assert [frame.shape for frame in frames] == [(40, 40, 3)] * 2
    assert (frames[0][0, 0] == frames[1][0, 0]).all()


def test_a_picture_knows_by_what_it_was_resized():
    half = at_resolution(record(picture(40, 20), png(30, 60)), 30)
    assert [images.scale_of(images.open_image(one)) for one in half.images] == [15 / 20, 30 / 60]
    again = flip_at_random(at_resolution(half, 10), np.random.default_rng(0), share=1)
    again = [images.open_image(again.images[0], transpose=turn) for turn in (False, True)]
    assert list(map(images.scale_of, again)) == pytest.approx([5 / 20] * 2)
    larger = at_resolution(record(picture(40, 20)), 80, enlarge=True)
    assert images.scale_of(images.open_image(larger.images[0])) == 2.0
    assert images.scale_of(images.open_image(picture(40, 20))) == 1.0


def test_sizes_that_the_processor_would_undo_are_refused_before_a_record_is_read():
    boxed = FuyuProcessor(ProcessorConfig(patch_size=8, max_height=32, max_width=48))
    shape = dict(seq_len=60, max_patches=45, max_targets=8, batch_size=1)
    for sides in ((16, 64, None), {"min": 24, "max": 40, "multiple": 8}):
        with pytest.raises(MMJaxError, match=r"resolution (64|40): .* box of 32 x 48 pixels"):
            make_train_iterator(Wide(), "fuyu_chat", boxed, resolutions=sides, **shape)


def test_the_processors_limit_of_pixels_holds_where_a_size_is_drawn(tmp_path):
    """Its message says to raise max_pixels; drawn sizes open the file before the processor does."""
    allowed = FuyuProcessor(ProcessorConfig(max_pixels=None))
    bomb = record(png(10_000, 9_000))
    assert (pixel_limit(allowed), pixel_limit(StubProcessor())) == (None, images.MAX_PIXELS)
    (small,) = at_resolution(bomb, 40, max_pixels=pixel_limit(allowed)).images
    assert np.shape(small) == (36, 40, 3)
    shape = dict(seq_len=60, max_patches=45, max_targets=8, batch_size=1, workdir=tmp_path)
    tight = FuyuProcessor(ProcessorConfig(max_pixels=700))
    with pytest.raises(MMJaxError, match="800 pixels, above the limit of 700"):
        next(make_train_iterator(Wide(), "fuyu_chat", tight, resolutions=(16,), epochs=1, **shape))
