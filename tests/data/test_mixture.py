"""How often each source is drawn, and that no record is drawn twice before all were drawn once."""

import collections

import numpy as np
import pytest

from mmjax.data.catalog import make_sources
from mmjax.data.mixture import Mixture, apportion
from mmjax.data.pipeline import draw_records
from mmjax.types import MMJaxError

SIZES = {"a": 37, "b": 1000, "c": 4}


class Sized:
    """A source of which only the length is asked."""

    def __init__(self, count, draws=None):
        self.count = count
        if draws is not None:
            self.draws = draws

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        raise AssertionError("drawing reads nothing")


SOURCES = {name: Sized(n) for name, n in SIZES.items()}


def draws(mixture, epochs=1, seed=0):
    dataset = draw_records(mixture, seed, epochs)
    return [dataset[i] for i in range(len(dataset))]


def test_shares_may_be_numpy_and_names_are_told_apart():
    assert Mixture.of(SOURCES, np.array([1.0, 2.0, 1.0])).counts == (260, 521, 260)
    mixture = Mixture.of(SOURCES, counts={"a": np.int64(5), "b": 2, "c": -1})
    assert mixture.counts == (5, 2, 4) and {type(n) for n in mixture.counts} == {int}
    with pytest.raises(MMJaxError, match=r"two sources have one name among \['1', '1'\]"):
        Mixture.of({1: Sized(2), "1": Sized(3)})


def test_an_epoch_by_size_is_every_record_once():
    mixture = Mixture.of(SOURCES)
    found = draws(mixture)
    assert mixture.counts == (37, 1000, 4) and len(found) == len(set(found)) == 1041
    assert found == draws(Mixture.of(SOURCES, "size"))
    two = draws(mixture, 2)
    assert two[:1041] == found and {d[2] for d in two[1041:]} == {1}
    assert [d[:2] for d in two[1041:]] != [d[:2] for d in found]
    assert sorted(d[:2] for d in two[1041:]) == sorted(d[:2] for d in found)
    assert found != draws(mixture, seed=1)


@pytest.mark.parametrize(
    "options, counts",
    [
        (dict(weights="sqrt"), None),
        (dict(weights={}, counts={}), (37, 1000, 4)),  # neither is given
        (dict(weights={}, counts={"a": 100, "b": 20, "c": -1}), (100, 20, 4)),
        (dict(weights=[1, 1, 0.001], counts={}), (520, 520, 1)),
        (dict(weights={"c": 2, "a": 1, "b": 1}), (260, 260, 521)),  # by name, in any order
        (dict(weights=[1, 1, 0.001]), (520, 520, 1)),
        (dict(weights=[1, 1, 1e-6]), (520, 520, 1)),  # never none at all
        (dict(counts={"a": 100, "b": 20, "c": -1}), (100, 20, 4)),
    ],
)
def test_shares_and_counts_are_kept_exactly_in_every_epoch(options, counts):
    mixture = Mixture.of(SOURCES, **options)
    assert mixture.epoch == sum(mixture.counts)
    if "sqrt" in options.values():
        roots = [n**0.5 for n in SIZES.values()]
        counts = tuple(apportion(roots, 1041))
        for count, root in zip(counts, roots, strict=True):
            assert abs(count - 1041 * root / sum(roots)) < 1
    assert mixture.counts == counts
    found = draws(mixture, 3)
    for epoch in range(3):
        part = found[epoch * mixture.epoch : (epoch + 1) * mixture.epoch]
        assert tuple(collections.Counter(d[0] for d in part)[i] for i in range(3)) == counts


@pytest.mark.parametrize("weights", ["size", "sqrt", {"a": 5, "b": 1, "c": 3}])
def test_every_record_is_seen_once_before_any_is_seen_twice(weights):
    mixture = Mixture.of(SOURCES, weights)
    seen = [collections.Counter() for _ in SIZES]
    for source, record, epoch in draws(mixture, 7):
        seen[source][record] += 1
        size = list(SIZES.values())[source]
        assert 0 <= record < size and seen[source][record] == epoch + 1
    for counter, size in zip(seen, SIZES.values(), strict=True):
        often = [counter[i] for i in range(size)]
        assert max(often) - min(often) <= 1


def test_draws_are_spread_evenly_over_an_epoch():
    mixture = Mixture.of(SOURCES, counts={"a": 30, "b": 60, "c": 10})
    order = [d[0] for d in draws(mixture)]
    for start in range(0, 100, 10):
        part = order[start : start + 10]
        assert [part.count(i) for i in range(3)] == [3, 6, 1]


def test_a_source_may_ask_for_more_draws_than_it_has_records():
    mixture = Mixture.of({"a": Sized(10, draws=25), "b": Sized(5)})
    assert mixture.counts == (25, 5)
    often = collections.Counter(d[1] for d in draws(mixture) if d[0] == 0)
    assert sorted(often.values()) == [2] * 5 + [3] * 5


def test_large_and_small_sources_are_shuffled_alike():
    for size in (4096, 4097):
        found = draws(Mixture.of(Sized(size)), 2)
        assert sorted(found[:size]) == [(0, i, 0) for i in range(size)]
        assert sorted(found[size:]) == [(0, i, 1) for i in range(size)]
        orders = [d[1] for d in found[:size]], [d[1] for d in found[size:]]
        assert orders[0] != orders[1] and all(o != sorted(o) for o in orders)


def test_one_source_for_ever():
    dataset = draw_records(Mixture.of(Sized(5)), 3)
    assert sorted(dataset[i][1] for i in range(5)) == list(range(5))
    assert dataset[5 * 10**9 + 2][2] == 10**9


@pytest.mark.parametrize(
    "sources, options, says",
    [
        ({}, {}, "no sources"),
        ({"a": Sized(3), "b": Sized(0)}, {}, "source 'b' is empty"),
        (SOURCES, dict(weights={"a": 1, "b": 0, "c": 2}), r"a 1, b 0, c 2\) must all be positive"),
        (SOURCES, dict(weights=[1, float("nan"), 1]), "must all be positive"),
        (SOURCES, dict(weights=[1, 2]), "2 weights for 3 sources"),
        (SOURCES, dict(weights="sqr"), "weights 'sqr' is unknown; give 'size', 'sqrt'"),
        ({"LADD": Sized(3)}, dict(weights={"LADB": 1}), "did you mean 'LADD' by 'LADB'"),
        (SOURCES, dict(counts={"a": 1, "b": 1}), "counts for .*give one for 'c' too"),
        ({"a": Sized(3)}, dict(weights={"a": 1, "yaml": 1}), "there is no source 'yaml'"),
        (SOURCES, dict(counts={"a": 1, "b": 0, "c": 1}), "counts {'b': 0}: .* at least 1"),
        (SOURCES, dict(counts={"a": 1, "b": 1.5, "c": 1}), "counts {'b': 1.5}"),
        (SOURCES, dict(weights="size", counts={"a": 1, "b": 1, "c": 1}), "both given"),
    ],
)
def test_mistakes_are_named(sources, options, says):
    with pytest.raises(MMJaxError, match=says):
        Mixture.of(sources, **options)


@pytest.mark.parametrize("kind, name, text", [("json", "a.json", "[]"), ("json", "a.jsonl", "")])
def test_a_source_without_records_is_named_with_its_path(tmp_path, kind, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(MMJaxError) as error:
        make_sources({"train": {"kind": kind, "path": str(tmp_path / name)}})
    assert str(error.value) == (
        f"data.sources.train: {tmp_path / name} holds no records; check it, or remove the source"
    )


def test_a_source_of_one_record_is_not_drawn_twice_for_a_rounded_share():
    """Of 50 records 1 / 50 * 50 is a hair below 1: it got its 1 and the remainder's, too."""
    for sizes in ([10, 8, 1, 30], [1, 4, 915_562, 24]):
        assert apportion([float(n) for n in sizes], sum(sizes)) == sizes
    assert apportion([0.9, 1.6, 3.5], 6) == [1, 2, 3]
