"""easy-VQA's groups and placements."""

import numpy as np
import pytest
from PIL import Image

from mmjax.data.catalog import make_source
from mmjax.data.easyvqa import ANSWERS, SHAPES, EasyVQACaptions, EasyVQASource, move_shape
from mmjax.data.images import load_rgb
from mmjax.types import MMJaxError


def test_groups_keep_their_questions_alone():
    source = EasyVQASource("train", groups=("shape",))
    assert len(source) == 5002
    assert {source[i].meta["group"] for i in range(0, 5002, 500)} == {"shape"}
    assert len(EasyVQASource("train")) == 38575
    with pytest.raises(MMJaxError, match="colour"):
        EasyVQASource("train", groups=("colour",))


def test_words_keep_the_questions_that_hold_one_of_them():
    source = EasyVQASource("train", groups=("yes/no",), words=SHAPES)
    assert len(source) == 7749
    asked = [source[i].messages for i in range(0, 7749, 500)]
    assert {answer.text for _, answer in asked} == {"yes", "no"}
    assert all(any(f" {shape}" in question.text for shape in SHAPES) for question, _ in asked)
    with pytest.raises(MMJaxError, match=r"\('yes/no',\) that holds one of \('Circle',\)"):
        EasyVQASource("train", groups=("yes/no",), words=("Circle",))


def test_placements_move_the_shape_and_change_nothing_else():
    once, many = EasyVQASource("train"), EasyVQASource("train", placements=3)
    assert len(many) == 3 * len(once)
    for index in (0, 7, 5000):
        record = once[index]
        places = [many[index + v * len(once)] for v in range(3)]
        assert all(r.messages == record.messages for r in places)
        before = load_rgb(record.images[0])
        pictures = [r.images[0] for r in places]
        for picture in pictures:
            colors = [np.unique(p.reshape(-1, 3), axis=0) for p in (before, picture)]
            np.testing.assert_array_equal(*colors)
            assert (picture != picture[0, 0]).any(-1).sum() == pytest.approx(
                (before != before[0, 0]).any(-1).sum(), rel=0.02
            ) or (before[0, 0] != picture[0, 0]).any()
        assert any((pictures[0] != p).any() for p in pictures[1:])
        np.testing.assert_array_equal(many[index].images[0], pictures[0])


def test_captions_say_what_the_answers_to_their_pictures_say():
    captions = EasyVQACaptions("test", placements=2)
    assert len(captions) == 2 * 791 and len(EasyVQACaptions("train")) == 3181
    said = {
        r.meta["image_id"]: r.messages[1].text.split()
        for r in map(captions.__getitem__, range(791))
    }
    questions = EasyVQASource("test", groups=("shape", "color"))
    for record in map(questions.__getitem__, range(len(questions))):
        words = said.get(record.meta["image_id"])
        asked = [w for w in record.messages[0].text.rstrip("?").split() if w in ANSWERS]
        assert words is None or {record.messages[1].text, *asked} <= set(words)
    first, again = captions[3], captions[3 + 791]
    assert first.messages == again.messages and (first.images[0] != again.images[0]).any()


def test_a_picture_can_be_told_in_place_of_being_shown():
    told = make_source(dict(kind="easyvqa", split="test", told=True))
    shown, captions = EasyVQASource("test"), EasyVQACaptions("test", told=True)
    assert len(told) == 7963 < len(shown)
    caption = {
        r.meta["image_id"]: r.messages[1].text for r in map(captions.__getitem__, range(791))
    }
    for record in map(told.__getitem__, range(0, len(told), 500)):
        question = shown[record.meta["line"]].messages[0].text
        assert record.messages[0].text == f"{caption[record.meta['image_id']]}\n{question}"
        assert record.images == ()
    assert captions[0].messages[0].text.split("\n")[0] == captions[0].messages[1].text
    with pytest.raises(MMJaxError, match="placements is 0"):
        EasyVQACaptions("test", placements=0)


def test_a_shape_in_a_corner_is_still_told_from_the_background(tmp_path):
    picture = np.full((64, 64, 3), 250, np.uint8)
    picture[:20, :12] = (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "corner.png")
    moved = move_shape(str(tmp_path / "corner.png"), np.random.default_rng(0))
    assert (moved == (0, 0, 255)).all(-1).sum() == 20 * 12
    assert (moved == 250).all(-1).sum() == 64 * 64 - 20 * 12
