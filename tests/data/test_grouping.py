"""Batches of one kind: who meets whom, on any number of streams and workers, and going on."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from stub_processor import StubProcessor

from mmjax.data.grouping import Grouped, arrange
from mmjax.data.mixture import Mixture
from mmjax.data.pipeline import draw_records, make_train_iterator
from mmjax.data.streams import Streams
from mmjax.monitor.meter import Meter
from mmjax.parallel.mesh import make_mesh
from mmjax.train import loop
from mmjax.train.lengths import check_lengths, fitted
from mmjax.train.settings import DataSettings, RunSettings
from mmjax.types import BadSample, Message, MMJaxError, Record

PICTURE = np.zeros((4, 4, 3), np.uint8)


class Mixed:
    """One record in three has a picture; record i has i % 7 words; ``bad`` ones are broken."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise BadSample("corrupt_image", f"record {i}: broken")
        pictures = (PICTURE,) if i % 3 == 0 else ()
        messages = (Message("user", "word " * (i % 7)), Message("assistant", "yes"))
        return Record(messages, pictures, {"id": str(i)})


SHAPE = dict(seq_len=64, max_patches=4, max_targets=8, prefetch=0)


def train(source, rows=4, count=1, number=0, **options):
    return make_train_iterator(
        source, "plain", StubProcessor(), batch_size=rows // count, process_index=number,
        process_count=count, **(SHAPE | dict(pack=False, group="modality") | options),
    )  # fmt: skip


def ids(records):
    return [int(row[0][1]) if row else None for row in records]


KINDS = [(True, 5), (False, 3), (True, 1), (False, 9), (True, 7), (False, 4), (True, 6), (False, 1)]
KINDS += [
    (False, 8),
    (True, 0),
]  # by words the pictures are 9, 2, 0, 6, 4 and the texts 7, 1, 5, 8, 3


class Emptied(dict):
    """Windows that another thread forgets as soon as this one has counted them."""

    def __len__(self):
        count = super().__len__()
        if count > 1:
            self.clear()
        return count


def test_threads_forget_windows_at_the_same_time():
    draws = [
        Grouped(lambda place: (0, place, 0), (Mixed(256),), None, 0, rows=1, _orders=orders)
        for orders in ({}, Emptied())
    ]
    places = [0, 64, 128, 192, 1]
    assert [draws[1](place) for place in places] == [draws[0](place) for place in places]


def arranged(kinds, begins=(), rows=2, seed=0):
    order = arrange(kinds, begins, rows, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(kinds)))
    return order.reshape(-1, rows).tolist()


def test_kinds_stay_apart_and_lengths_together():
    # The shortest of each kind are left over, and meet.
    assert sorted(arranged(KINDS)) == [[1, 5], [2, 0], [6, 4], [8, 3], [9, 7]]
    assert arranged(KINDS, seed=1) != arranged(KINDS)
    assert sorted(arranged(KINDS[:9], rows=3)) == [[0, 6, 4], [2, 7, 1], [5, 8, 3]]


def test_no_draw_is_moved_past_the_place_where_a_source_begins_anew():
    first, second, *rest = arranged(KINDS, begins=[3])
    assert (first, second) == ([0, 1], [2, 3])  # the place falls into the second batch
    assert sorted(rest) == [[5, 8], [6, 4], [9, 7]]


def steps_of(count, epochs, streams=1, workers=1):
    """Steps of 4 draws (source, record, epoch), sliced as streams and grain's workers are."""
    grouped = dict(rows=4, streams=streams, workers=workers)
    draws = draw_records(Mixture.of(Mixed(count)), 0, epochs, **grouped)
    each = [[draws[i::streams][w::workers] for w in range(workers)] for i in range(streams)]
    rows = 4 // streams
    return [
        [each[i][t % workers][t // workers * rows + q] for i in range(streams) for q in range(rows)]
        for t in range(count * epochs // 4)
    ]


@pytest.mark.parametrize("streams, workers", [(1, 1), (4, 1), (2, 2)])
def test_every_step_has_one_kind_on_any_number_of_streams_and_workers(streams, workers):
    steps = steps_of(48, 2, streams, workers)
    kinds = [{record % 3 == 0 for _, record, _ in step} for step in steps]
    assert kinds.count({True}) == 8 and kinds.count({False}) == 16
    for epoch in range(2):
        records = [draw[1] for step in steps[epoch * 12 : epoch * 12 + 12] for draw in step]
        assert sorted(records) == list(range(48))
    if workers == 1:  # the same records meet, whoever reads them
        assert [sorted(step) for step in steps] == [sorted(step) for step in steps_of(48, 2)]


def test_no_record_comes_twice_before_each_came_once():
    steps = steps_of(50, 3)  # an epoch is 12 and a half of them
    epochs = [[epoch for *_, epoch in step] for step in steps]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(epochs))
    assert [set(e) for e in epochs].count({0, 1}) == 1
    assert sorted(draw[1] for step in steps[:25] for draw in step) == sorted([*range(50)] * 2)


def test_what_fills_no_batch_of_every_worker_comes_at_the_end():
    draws = draw_records(Mixture.of(Mixed(12)), 0, 1, rows=4, streams=1, workers=2)
    assert sorted(draws[i][1] for i in range(12)) == list(range(12))


def test_each_record_is_looked_at_once_and_its_picture_never():
    asked = []

    class Outlined(Mixed):
        def outlines(self, i):
            asked.append(i // 8)
            first = i // 8 * 8
            return first, [Mixed.__getitem__(self, k) for k in range(first, first + 8)]

        def __getitem__(self, i):
            raise AssertionError(f"reads record {i}")

    class Counted(Mixed):  # one that has nothing smaller to read
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)

    def order(source):
        draws = draw_records(Mixture.of(source), 0, 2, rows=4, streams=1, workers=1)
        return [draws[i] for i in range(96)]

    want = order(Mixed(48))
    assert order(Outlined(48)) == want and sorted(asked) == list(range(6))
    asked.clear()
    order(Counted(48, bad={5}))
    assert sorted(asked) == list(range(48))


def test_the_order_of_batches_is_another_in_every_window():
    class Alike(Mixed):
        def __getitem__(self, i):
            return super().__getitem__(1)

    grouped = Grouped(lambda place: (0, place, 0), (Alike(128),), None, 0, rows=1)
    first, second = ([grouped(i)[1] % 64 for i in range(at, at + 64)] for at in (0, 64))
    assert sorted(first) == sorted(second) == list(range(64)) and first != second


def test_a_bad_sample_leaves_its_row_empty_and_streams_stay_together():
    bad = {7, 9}  # sorted as texts without words: 13 samples with a picture, 27 without
    whole = train(Mixed(40, bad), max_bad_share=1.0)
    parts = [train(Mixed(40, bad), count=4, number=i, max_bad_share=1.0) for i in range(4)]
    parts = Streams(dict(enumerate(parts)), 4)
    mixed = empty = 0
    for _ in range(10):
        batch, shared = next(whole), next(parts)
        records = ids(parts.records)
        assert sorted(map(str, records)) == sorted(map(str, ids(whole.records)))
        assert batch["tokens"].shape == shared["tokens"].shape == (4, 64)
        assert parts.images == whole.images
        assert [record is not None for record in records] == shared["segment_ids"].any(1).tolist()
        mixed += {False, True} <= {record is not None and record % 3 == 0 for record in records}
        empty += records.count(None)
    assert (mixed, empty) == (1, 2) and whole.skips.counts == {"corrupt_image": 2}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.heavy)])
def test_it_goes_on_where_it_stood(workers):
    source = Mixed(40, bad={7})
    one, again = (train(source, num_workers=workers, max_bad_share=1.0) for _ in range(2))
    for _ in range(7):
        next(one)
    again.set_state(one.get_state())
    mixed = 0
    for _ in range(6):  # into the next epoch
        a, b = next(one), next(again)
        assert one.records == again.records
        mixed += len({record % 3 == 0 for record in ids(one.records) if record is not None}) > 1
        for name, value in a.items():
            np.testing.assert_array_equal(value, b[name], err_msg=name)
    assert mixed <= 2  # one in an epoch
    one.close()
    again.close()
    with pytest.raises(MMJaxError, match="group was 'modality' and is None"):
        train(source, group=None).set_state(train(source).get_state())


def test_a_last_batch_of_bad_samples_alone_comes_after_a_restart_too():
    one, again = (
        train(Mixed(16, bad=range(8)), epochs=1, max_bad_share=1.0, seed=3) for _ in range(2)
    )
    counts = [np.count_nonzero(next(one)["segment_ids"]) for _ in range(3)]
    again.set_state(one.get_state())
    last = [list(it) for it in (one, again)]
    assert [len(batches) for batches in last] == [1, 1] and min(counts) > 0
    assert not last[0][0]["segment_ids"].any()
    for name, value in last[0][0].items():
        np.testing.assert_array_equal(value, last[1][0][name], err_msg=name)


def test_what_was_looked_at_ahead_still_comes():
    """What patches are like is not known yet where the first batch is of bad samples alone."""
    found = train(Mixed(16, bad=range(8)), epochs=1, max_bad_share=1.0, seed=1)
    records = [{x for x in ids(found.records) if x is not None} for _ in found]
    assert records[0] == set() and sorted(x for some in records for x in some) == [*range(8, 16)]


def test_grouped_batches_fit_shorter_rows():
    def padding(group):
        batches = [fitted(b, range(8, 64, 8)) for b in train(Mixed(48), epochs=1, group=group)]
        used = sum(np.count_nonzero(batch["segment_ids"]) for batch in batches)
        return 1 - used / sum(batch["segment_ids"].size for batch in batches)

    assert padding("modality") < 0.2 < 0.4 < padding(None)


def test_rows_are_cut_to_the_shortest_length_that_holds_them():
    tokens, used = np.arange(20).reshape(2, 10), np.zeros((2, 10), int)
    used[0, :3] = used[1, :5] = 1
    batch = dict(
        tokens=tokens, segment_ids=used, positions=tokens, visual_index=np.full((2, 10), -1),
        patches=np.zeros((2, 4, 3)), target_index=tokens[:, :7], target_source=tokens[:, :7],
    )  # fmt: skip
    cut = fitted(batch, (8, 5))  # five tokens have no more than five targets, which stand in front
    assert {x.shape for name, x in cut.items() if name != "patches"} == {(2, 5)}
    assert cut["patches"].shape == (2, 1, 3)
    np.testing.assert_array_equal(cut["target_index"], tokens[:, :5])
    assert fitted(batch, (8,))["target_index"].shape == (2, 7)
    np.testing.assert_array_equal(fitted(batch, (4, 8))["tokens"], tokens[:, :8])
    assert fitted(batch, (4,))["tokens"].shape == (2, 10) and fitted(batch, ()) is batch
    batch["visual_index"][1, 2] = 0
    assert fitted(batch, (8,))["patches"].shape == (2, 4, 3)


def test_agreeing_on_a_length_is_no_wait_for_data(monkeypatch):
    """Of several processes it waits for the step under way: more data workers would not help."""
    now = [0.0]

    def after(seconds, value):
        now[0] += seconds
        return value

    meter = Meter(9, clock=lambda: now[0])
    meter.step()  # compiles
    monkeypatch.setattr(loop.lengths, "fitted", lambda batch, _: after(2.0, batch))
    monkeypatch.setattr(loop, "put_batch", lambda batch, *_: batch)
    training = object.__new__(loop.Training)
    training.settings, training._batches = RunSettings(), (after(0.5, {}) for _ in range(1))
    training._mesh = training.state = training.frozen = None
    told = dict.fromkeys(("picture", "sample"), lambda *_: None)
    training.reports = SimpleNamespace(meter=meter, **told)
    training._next_batch(0)
    meter.step()
    assert meter.report() == {"perf/step_s": 2.5, "perf/data_wait_s": 0.5}


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(MMJaxError, match="group='modality' is for rows of one sample"):
        train(Mixed(4), pack=True)
    with pytest.raises(MMJaxError, match="group is 'length'; choose modality"):
        train(Mixed(4), group="length")
    with pytest.raises(MMJaxError, match=r"data\.lengths holds 64 and data\.seq_len is 64"):
        check_lengths(DataSettings(seq_len=64, lengths=(64,)), make_mesh({}, jax.devices()[:1]))
