"""The assignment is exact: brute force on small ones, scipy's on larger ones."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mmjax.data.assignment import best_assignment


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (3, 5), (5, 3), (4, 1)])
def test_no_other_assignment_is_better(shape):
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(-4, 5, shape).astype(float)  # many ties
        found = best_assignment(scores)
        rows = [i for i in range(shape[0]) if found[i] >= 0]
        columns = found[rows]
        assert len(rows) == min(shape) == len(set(columns))
        wide = scores if shape[0] <= shape[1] else scores.T
        best = max(
            sum(wide[i, c] for i, c in enumerate(chosen))
            for chosen in itertools.permutations(range(wide.shape[1]), wide.shape[0])
        )
        assert scores[rows, columns].sum() == best


@pytest.mark.parametrize("shape", [(12, 12), (7, 40), (40, 7), (60, 61)])
def test_it_is_the_one_that_scipy_finds(shape):
    for seed in range(5):
        scores = np.random.default_rng(seed).random(shape)  # no ties: there is one best
        rows, columns = linear_sum_assignment(-scores)
        wanted = np.full(shape[0], -1)
        wanted[rows] = columns
        np.testing.assert_array_equal(best_assignment(scores), wanted)


def test_nothing_to_assign():
    assert best_assignment(np.zeros((0, 3))).shape == (0,)
    assert best_assignment(np.zeros((2, 0))).tolist() == [-1, -1]
