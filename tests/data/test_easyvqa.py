"""easy-VQA's groups and placements."""

import numpy as np
import pytest
from PIL import Image

from mmjax.data.easyvqa import EasyVQASource, move_shape
from mmjax.data.images import load_rgb
from mmjax.types import MMJaxError


def test_groups_keep_their_questions_alone():
    source = EasyVQASource("train", groups=("shape",))
    assert len(source) == 5002
    assert {source[i].meta["group"] for i in range(0, 5002, 500)} == {"shape"}
    assert len(EasyVQASource("train")) == 38575
    with pytest.raises(MMJaxError, match="colour"):
        EasyVQASource("train", groups=("colour",))


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


def test_a_shape_in_a_corner_is_still_told_from_the_background(tmp_path):
    picture = np.full((64, 64, 3), 250, np.uint8)
    picture[:20, :12] = (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "corner.png")
    moved = move_shape(str(tmp_path / "corner.png"), np.random.default_rng(0))
    assert (moved == (0, 0, 255)).all(-1).sum() == 20 * 12
    assert (moved == 250).all(-1).sum() == 64 * 64 - 20 * 12
