"""Numbers of a config that cannot work, and would train without a word."""

import re

import pytest

from mmjax.schema import to_dataclass
from mmjax.train.settings import RunSettings, check_numbers
from mmjax.types import MMJaxError


@pytest.mark.parametrize(
    "room, name, value, bound",
    [
        (None, "steps", 0, "at least 1"),
        (None, "seed", -1, "at least 0"),
        ("optim", "lr", -1e-5, "at least 0"),  # climbs
        ("optim", "lr", float("nan"), "at least 0"),
        ("optim", "clip_norm", -1.0, "at least 0"),  # turns every gradient round
        ("optim", "warmup", -5.0, "at least 0"),
        ("optim", "b1", 1.5, "below 1"),
        ("optim", "b2", 1.0, "below 1"),
        ("data", "workers", -1, "at least 0"),
        ("eval", "batch_size", 0, "at least 1"),
        ("eval", "limit", 0, "at least 1"),
        ("bad_steps", "max_loss", -1.0, "at least 0"),
        (None, "seed", 2**63, "below 2**63"),
        (None, "steps", 2**31, "below 2**31"),  # the count of steps is an int32
    ],
)
def test_numbers_that_cannot_work_are_named(room, name, value, bound):
    config = {name: value} if room is None else {room: {name: value}}
    path = name if room is None else f"{room}.{name}"
    with pytest.raises(
        MMJaxError, match=f"config.{path} is {value}; it .*must be {re.escape(bound)}"
    ):
        check_numbers(to_dataclass(RunSettings, config))


@pytest.mark.parametrize("name", ["lr", "warmup", "final_lr", "eps", "weight_decay"])
def test_infinite_numbers_are_refused(name):
    """eps would train nothing without a word, lr make all a NaN, warmup end in a traceback."""
    with pytest.raises(MMJaxError, match=f"config.optim.{name} is inf; give a finite number"):
        check_numbers(to_dataclass(RunSettings, {"optim": {name: float("inf")}}))


def test_a_profile_behind_the_last_step_is_refused():
    def given(start):
        config = {"steps": 5, "log": {"profile": (start, 9)}}
        check_numbers(to_dataclass(RunSettings, config))

    given(4)
    with pytest.raises(MMJaxError, match=r"config.log.profile is \(5, 9\) and config.steps 5"):
        given(5)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_float16_is_for_answers_alone(name):
    with pytest.raises(MMJaxError, match=f"config.model.{name} is 'float16'.*'bfloat16', or 'fl"):
        check_numbers(to_dataclass(RunSettings, {"model": {name: "float16"}}))
    check_numbers(to_dataclass(RunSettings, {"model": {"frozen_dtype": "float16"}}))


def test_shares_and_counts_at_once_are_refused_and_empty_ones_are_none():
    both = {"weights": {"a": 1.0}, "counts": {"a": 3}}
    with pytest.raises(MMJaxError, match="data.weights and data.counts are both given"):
        check_numbers(to_dataclass(RunSettings, {"data": both}))
    for empty in ("weights", "counts"):
        check_numbers(to_dataclass(RunSettings, {"data": both | {empty: {}}}))


def test_grouping_that_packing_leaves_no_sense_is_refused():
    with pytest.raises(MMJaxError, match="group='modality' is for rows of one sample"):
        check_numbers(to_dataclass(RunSettings, {"data": {"group": "modality"}}))


def test_numbers_at_their_bounds_are_let_through():
    optim = {"lr": 0.0, "warmup": 0, "clip_norm": 0.0, "b1": 0.0, "weight_decay": 0.0}
    config = {"steps": 1, "optim": optim, "bad_steps": {"max_loss": float("inf")}}
    check_numbers(to_dataclass(RunSettings, config))
