"""The best one-to-one assignment of rows to columns, exactly."""

from __future__ import annotations

import numpy as np


def best_assignment(scores: np.ndarray) -> np.ndarray:
    """Return int64[n], a column for each row, no column twice, with the largest sum of scores.

    scores: finite numbers [n, m]. Where there are more rows than columns, the rows left over get
    -1. The Hungarian method by shortest augmenting paths: O(n^2 m), the inner loop in numpy.
    """
    n, m = scores.shape
    if n > m:
        columns = np.full(n, -1, np.int64)
        columns[best_assignment(scores.T)] = np.arange(m)
        return columns
    cost = -np.asarray(scores, np.float64)
    row_price, column_price = np.zeros(n), np.zeros(m)
    column_of, row_of = np.full(n, -1, np.int64), np.full(m, -1, np.int64)
    for first in range(n):
        # Dijkstra from this row to the nearest free column, through rows that have one already;
        # the prices keep every remaining cost above zero, and those of the assigned pairs at zero.
        length, before = np.full(m, np.inf), np.full(m, -1, np.int64)
        done = np.zeros(m, bool)
        row, walked = first, 0.0
        while True:
            through = walked + cost[row] - row_price[row] - column_price
            better = ~done & (through < length)
            length[better], before[better] = through[better], row
            column = int(np.argmin(np.where(done, np.inf, length)))
            done[column], walked = True, length[column]
            if row_of[column] < 0:
                break
            row = row_of[column]
        passed = done & (row_of >= 0)
        row_price[first] += walked
        row_price[row_of[passed]] += walked - length[passed]
        column_price[done] -= walked - length[done]
        while column >= 0:  # turn the path over: each of its rows takes the next column
            row = before[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    return column_of
