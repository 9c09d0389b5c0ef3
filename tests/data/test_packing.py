import numpy as np
import pytest

from mmjax.data.packing import BatchBuilder, BatchShape, Origin, pack
from mmjax.types import BadSample, MMJaxError


def example(seed, patches, text, targets):
    """Image tokens, then text; the last tokens are targets; every number tells its sample."""
    n = patches + text
    mask = np.zeros(n, bool)
    mask[n - targets :] = targets > 0
    return {
        "tokens": (100 * seed + np.arange(n)).astype(np.int32),
        "positions": np.arange(n, dtype=np.int32),
        "loss_mask": mask,
        "visual_index": np.where(np.arange(n) < patches, np.arange(n), -1).astype(np.int32),
        "patches": np.full((patches, 3), seed, np.uint8)
        + np.arange(patches, dtype=np.uint8)[:, None],
    }


def test_pack_lays_two_samples_behind_one_another():
    batch = pack([example(1, 2, 2, 1), example(2, 1, 3, 2)], BatchShape(1, 10, 4, 5))
    assert {k: v.tolist() for k, v in batch.items() if k != "patches"} == {
        "tokens": [[100, 101, 102, 103, 200, 201, 202, 203, 0, 0]],
        "positions": [[0, 1, 2, 3, 0, 1, 2, 3, 0, 0]],
        "visual_index": [[0, 1, -1, -1, 2, -1, -1, -1, -1, -1]],
        "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 2, 0, 0]],
        "target_index": [[3, 6, 7, -1, -1]],
        "target_source": [[0, 0, 0, -1, -1]],
    }
    assert batch["patches"][0, :, 0].tolist() == [1, 2, 2, 0]
    assert [batch[k].dtype for k in ("tokens", "patches")] == [np.int32, np.uint8]


def test_targets_name_their_source_and_rows_their_records():
    builder = BatchBuilder(BatchShape(2, 6, 4, 3))
    origins = [Origin(2, "caption", "a"), Origin(0, "vqa", "b"), Origin(1, "ocr", "c")]
    for number, (origin, row) in enumerate(zip(origins, (0, 0, 1), strict=True)):
        builder.add(example(number, 1, 2, 1 + number // 2) | {"origin": origin}, row)
    assert builder.batch()["target_source"].tolist() == [[2, 0, -1], [1, 1, -1]]
    assert builder.origins == [origins[:2], origins[2:]]


def test_normalised_pixels_stay_what_they_are_behind_text():
    text, picture = example(1, 0, 2, 1), example(2, 1, 2, 1)
    normalised = picture | {"patches": np.float32([[-0.5, 0.25, 1]])}
    for order in ([text, normalised], [normalised, text]):
        batch = pack(order, BatchShape(1, 10, 4, 5))
        assert batch["patches"].dtype == np.float32
        assert batch["patches"][0, :2].tolist() == [[-0.5, 0.25, 1], [0, 0, 0]]
    for order in ([picture, normalised], [normalised, picture]):
        with pytest.raises(MMJaxError, match="uint8 is grey levels, floats are normalised"):
            pack(order, BatchShape(1, 10, 4, 5))


def test_packing_keeps_every_sample_whole():
    rng = np.random.default_rng(0)
    samples = [example(i, *rng.integers(1, 6, 2), 1) for i in range(1, 30)]
    batch = pack(samples, BatchShape(8, 40, 24, 9))
    seen = set()
    for row in range(8):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            places = np.flatnonzero(batch["segment_ids"][row] == segment)
            number = batch["tokens"][row, places[0]] // 100
            want = samples[number - 1]
            np.testing.assert_array_equal(batch["tokens"][row, places], want["tokens"])
            np.testing.assert_array_equal(batch["positions"][row, places], want["positions"])
            visual = batch["visual_index"][row, places]
            np.testing.assert_array_equal(visual >= 0, want["visual_index"] >= 0)
            np.testing.assert_array_equal(
                batch["patches"][row, visual[visual >= 0]], want["patches"]
            )
            targets = np.intersect1d(batch["target_index"][row], places)
            np.testing.assert_array_equal(targets, places[want["loss_mask"]])
            seen.add(int(number))
        used = batch["target_index"][row][batch["target_index"][row] >= 0]
        assert (np.diff(used) > 0).all()
    assert seen == set(range(1, 30))


@pytest.mark.parametrize("limits", [(9, 9, 9), (20, 3, 9), (20, 9, 1)])
def test_a_row_is_full_when_any_of_the_three_is(limits):
    builder = BatchBuilder(BatchShape(1, *limits))
    assert not builder
    assert builder.try_add(example(1, 2, 3, 1))
    before = builder.batch()["tokens"].copy()
    assert not builder.try_add(example(2, 2, 3, 1))
    np.testing.assert_array_equal(builder.batch()["tokens"], before)


def test_best_fit_prefers_the_fullest_row_that_has_room():
    builder = BatchBuilder(BatchShape(3, 10, 10, 10))
    builder.add(example(1, 0, 4, 1), 0)
    builder.add(example(2, 0, 7, 1), 1)
    builder.add(example(3, 0, 9, 1), 2)
    assert builder.try_add(example(4, 0, 3, 1))
    assert builder.samples.tolist() == [1, 2, 1]


def test_the_first_token_of_a_sample_is_never_a_target():
    sample = example(2, 0, 3, 3)
    batch = pack([example(1, 0, 2, 1), sample], BatchShape(1, 8, 1, 6))
    assert batch["target_index"].tolist() == [[1, 3, 4, -1, -1, -1]]


@pytest.mark.parametrize(
    "sizes, reason, option",
    [
        ((2, 9, 1), "too_long", "seq_len"),
        ((5, 1, 1), "too_many_patches", "max_patches"),
        ((1, 6, 4), "too_many_targets", "max_targets"),
        ((1, 2, 0), "empty_answer", "training target"),
    ],
)
def test_what_fits_no_row_is_a_bad_sample(sizes, reason, option):
    with pytest.raises(BadSample, match=f"s7: .*{option}") as error:
        BatchShape(1, 10, 4, 3).check(example(1, *sizes), "s7")
    assert error.value.reason == reason
