import pickle

import numpy as np
import pytest

from mmjax.data import magnifier
from mmjax.data.magnifier import LETTERS, MagnifierSource
from mmjax.data.resizing import at_resolution, draw_resolution
from mmjax.types import MMJaxError


def digit_pixels(record):
    top, left, bottom, right = record.meta["box"]
    return record.images[0][top:bottom, left:right]


def test_everything_is_a_function_of_seed_split_and_index():
    a, b = MagnifierSource("train"), pickle.loads(pickle.dumps(MagnifierSource("train")))
    np.testing.assert_array_equal(a[5].images[0], b[5].images[0])
    assert a[5].messages == b[5].messages and a[5].meta == b[5].meta
    assert (a[5].images[0] != a[6].images[0]).any()
    assert (a[5].images[0] != MagnifierSource("train", seed=1)[5].images[0]).any()
    assert len(a) == 20_000 and len(pickle.dumps(a)) < 400


def test_the_digit_is_there_whole_and_on_the_grid():
    images, _, labels = magnifier._digits()
    known = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    source = MagnifierSource("train", align=8)
    for i in range(50):
        record = source[i]
        assert record.images[0].shape == (96, 96, 3) and record.images[0].dtype == np.uint8
        pixels = digit_pixels(record)
        assert (pixels == pixels[..., :1]).all()
        assert known[pixels[..., :1].tobytes()] == record.meta["digit"]
        assert all(v % 8 == 0 for v in record.meta["box"])
    anywhere = MagnifierSource("train", align=1)
    assert any(anywhere[i].meta["box"][0] % 8 for i in range(20))


def test_test_digits_and_photographs_are_never_trained_on():
    images, rows, _ = magnifier._digits()
    assert len(set(rows["train"]) | set(rows["test"])) == len(images) == 1797
    assert not set(rows["train"]) & set(rows["test"])
    test = MagnifierSource("test")
    shown = [digit_pixels(test[i])[..., :1].tobytes() for i in range(len(test))]
    assert sorted(shown) == sorted(images[r].tobytes() for r in rows["test"])
    for train, held_out in zip(*magnifier._photographs().values(), strict=True):
        assert train.shape[1] + held_out.shape[1] == 640


def test_multiple_choice_asks_about_the_same_pictures():
    plain, choice = MagnifierSource("test"), MagnifierSource("test_mc")
    assert len(plain) == len(choice) == 359
    letters = set()
    for i in range(40):
        a, b = plain[i], choice[i]
        np.testing.assert_array_equal(a.images[0], b.images[0])
        assert a.messages[1].text == str(a.meta["digit"]) and a.meta["group"] == "open"
        letter, choices = b.messages[1].text, b.meta["choices"]
        assert choices[LETTERS.index(letter)] == str(b.meta["digit"]) and len(set(choices)) == 4
        assert f"{letter}. {b.meta['digit']}" in b.messages[0].text
        letters.add(letter)
    assert letters == set(LETTERS)


def test_training_asks_both_ways_as_often_as_told():
    def share(value):
        source = MagnifierSource("train", mc_share=value)
        return np.mean([source[i].meta["group"] == "mc" for i in range(200)])

    assert share(0.0) == 0 and share(1.0) == 1 and 0.15 < share(0.25) < 0.35


def test_bad_arguments_say_what_is_allowed():
    with pytest.raises(MMJaxError, match="no split 'dev'; it has train, test, test_mc"):
        MagnifierSource("dev")
    with pytest.raises(MMJaxError, match="image_size 200"):
        MagnifierSource("train", image_size=200)


def test_at_resolution_reduces_and_never_enlarges():
    record = MagnifierSource("train")[0]
    assert np.shape(at_resolution(record, 24).images[0]) == (24, 24, 3)
    assert at_resolution(record, 96).images[0] is record.images[0]
    assert at_resolution(record, None) is record
    flat = np.full((40, 80, 3), 7, np.uint8)
    wide = np.asarray(at_resolution(type(record)(record.messages, (flat,)), 20).images[0])
    assert wide.shape == (10, 20, 3) and (wide == 7).all()


def test_resolutions_are_drawn_evenly():
    drawn = [draw_resolution((96, 48, 24), np.random.default_rng((0, i))) for i in range(300)]
    assert all(70 < drawn.count(side) < 130 for side in (96, 48, 24))
    assert draw_resolution(None, np.random.default_rng(0)) is None


def test_digits_and_photographs_are_scikit_learns():
    from sklearn import datasets

    theirs, (images, _, labels) = datasets.load_digits(), magnifier._digits()
    np.testing.assert_array_equal(images[..., 0], np.round(theirs.images * 255 / 16))
    np.testing.assert_array_equal(labels, theirs.target)
    for name, *parts in zip(("china", "flower"), *magnifier._photographs().values(), strict=True):
        whole = datasets.load_sample_image(f"{name}.jpg")
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(magnifier.importlib.metadata, "files", lambda _: [])
    with pytest.raises(MMJaxError, match=r"digits.csv.gz comes with .* pip install 'mmjax\[recip"):
        magnifier._file("digits.csv.gz")
