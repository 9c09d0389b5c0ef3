"""Summaries of rows: every number by hand, and no number of what was not asked."""

import pytest

from mmjax.evals import summaries, yes_no
from mmjax.evals.summaries import get_summary, metric_rows, show_metric
from mmjax.types import BadSample


def values(metrics):
    return {name: metric["value"] for name, metric in metrics.items()}


def rows(*given, **more):
    """Rows of (group, score), unread where more does not say otherwise."""
    return [{"group": group, "score": score, "read": None, **more} for group, score in given]


def test_precision_and_recall_have_each_their_own_whole():
    said = [
        ("yes", "Yes"),
        ("yes", "no"),
        ("yes", "no"),
        ("yes", "no"),
        (None, "yes"),
        ("no", "no"),
    ]
    asked = [{"read": read, "answer": answer, "score": 0.0} for read, answer in said]
    assert values(summaries.yes_no(asked)) == {
        "precision": 0.25, "recall": 0.5, "F1": 0.333333, "yes": 0.666667, "neither": 0.166667
    }  # fmt: skip
    whole, groups = get_summary("yes_no").of([row | {"group": "random"} for row in asked])
    assert whole["mean F1"] == groups["random"]["F1"]  # of one group its own


def test_a_unit_that_is_partly_right_is_not():
    pair = [{"unit": "a", "score": 1.0}, {"unit": "a", "score": 0.5}]
    assert summaries.units_right(pair)["value"] == 0.0


def test_an_unreadable_question_is_a_wrong_circle_of_its_own():
    circle = [{"unit": "a", "score": 1.0}, {"unit": "a", "score": 1.0}, {"score": 0.0}]
    assert values(summaries.circular(circle)) == {"circular": 0.5, "plain": 0.5}
    assert values(summaries.circular(circle[2:])) == {"plain": 0.0}


def test_parts_of_which_nothing_was_asked_have_no_number():
    whole, groups = get_summary("mme").of(rows(("OCR", 1.0), ("OCR", 0.0), unit="a"))
    assert whole["perception"] == {"value": 50.0, "of": 200} and "cognition" not in whole
    assert groups["OCR"]["score"]["value"] == 50.0
    found = get_summary("gqa").of(rows(("query", 1.0), ("query", 0.0), (None, 1.0)))[0]
    assert values(found) == {"open": 0.5}  # what could not be read has no type
    whole, groups = get_summary("seedbench").of(rows(("Scene Understanding", 1.0)))
    assert values(whole) == {"image": 1.0} and groups == {}


def test_mmmus_questions_with_options_and_open_ones_are_told_apart():
    asked = rows(("Art", 1.0), ("Art", 1.0), ("Music", 0.0), choices=["a", "b"])
    asked += rows(("Music", 0.0), choices=[])
    found = values(get_summary("mmmu").of(asked)[0])
    assert found == {"Art and Design": 0.5, "options": 0.666667, "open": 0.0, "unread": 1.0}


def test_metrics_are_laid_out_with_those_of_groups_first():
    one = {"value": 0.5, "of": 1}
    groups = {"x": {"metrics": {"F1": one}}, "y": {}}  # y has a score alone
    entries = {"test": {"metrics": {"mean F1": one, "F1": one}, "groups": groups}, "224": {}}
    names, lines = metric_rows(entries)
    assert names == ["F1", "mean F1"]
    assert [(at, group) for at, group, _ in lines] == [("test", ""), ("test", "x")]
    shown = [show_metric({"value": v, **of}) for v, of in (
        (0.8604, {"of": 1}), (1223.44, {"of": 2000}), (101.26, {})
    )]  # fmt: skip
    assert shown == ["86.0%", "1,223.4 of 2,000", "101.3"]


def test_the_right_one_of_yes_and_no_is_read_loosely_and_nothing_else_is_one():
    assert yes_no.yes_no("Yes.", [" Yes "]) == 1.0
    with pytest.raises(BadSample, match="the right answer is 'maybe'; expected yes or"):
        yes_no.yes_no("maybe", ["maybe"])
