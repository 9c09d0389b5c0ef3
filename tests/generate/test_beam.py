"""Beam search beside its definition in plain Python, over models of a table of logits."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.generate import beam
from mmjax.generate.beam import Beams, Prefilled
from mmjax.generate.constraints import Constraints

V, ENDS, BEAMS, RETURNED, NEW = 12, (3, 5, 6), 3, 2, 6
PROMPTS = [[0, 7], [7, 8, 9], [1, 2, 3, 4]]


class Last(NamedTuple):
    """What a cache is here: the token before the one that is decoded."""

    token: jax.Array

    def take(self, rows):
        return Last(self.token[rows])


@partial(jax.jit, static_argnames="limits")
def searched(table, ranking, limits):
    """Return (rows, counts) of the prompts; a token's logits follow from it and the one before."""
    lengths = np.int32([len(p) for p in PROMPTS])
    history = np.zeros((len(PROMPTS), 4 + NEW), np.int32)
    for row, prompt in enumerate(PROMPTS):
        history[row, : len(prompt)] = prompt
    before, last = np.int32([p[-2:] for p in PROMPTS]).T
    prompts = Prefilled(
        lambda tokens, cache: (table[cache.token, tokens], Last(tokens)), table[before, last],
        Last(jnp.repeat(last, BEAMS)), jnp.asarray(history), jnp.asarray(lengths),
        jnp.ones(len(PROMPTS), bool), jnp.int32(NEW), jnp.int32(ENDS),
    )  # fmt: skip
    return beam.search(prompts, Beams(BEAMS, num_return_sequences=RETURNED), ranking, limits)


def defined(table, prompt, penalty, stopping, limits):
    """Return the answers of a prompt, the best first."""
    running, ended = [(0.0, prompt)], []
    for step in range(1, NEW + 1):
        found = []
        for score, row in running:
            logits = table[row[-2], row[-1]]
            scores = score + logits - np.log(np.exp(logits).sum())
            if limits.no_repeat_ngram_size:
                scores[row] = -np.inf
            if step <= limits.min_new_tokens:
                scores[list(ENDS)] = -np.inf
            found += [(s, [*row, token]) for token, s in enumerate(scores)]
        found.sort(key=lambda one: -one[0])
        over = [row[-1] in ENDS or step == NEW for _, row in found]
        now = [one for one, is_over in zip(found[:BEAMS], over, strict=False) if is_over]
        ended += [(score / step**penalty, row) for score, row in now]
        ended = sorted(ended, key=lambda one: -one[0])[:BEAMS]
        running = [one for one, is_over in zip(found, over, strict=True) if not is_over][:BEAMS]
        if len(ended) == BEAMS and running:
            longest = stopping == "never" and penalty > 0
            hope = running[0][0] / (NEW if longest else step) ** penalty
            if stopping is True or hope <= ended[-1][0]:
                break
    rows = [row[len(prompt) :] for _, row in ended[:RETURNED]]
    return [row[:-1] if row[-1] in ENDS else row for row in rows]


def test_never_ranks_by_the_greatest_length_only_where_that_is_the_best():
    """With a penalty below 0 a longer answer of the same sum has the lower score."""
    found = [Beams(3, penalty, "never").ranking(NEW).longest for penalty in (-1.0, 0.0, 1.0)]
    assert found == [False, False, True]


@pytest.mark.parametrize("limits", [Constraints(), Constraints(1.0, 1, min_new_tokens=2)])
def test_answers_are_the_best_that_end_whatever_the_rule(limits):
    answers = set()
    for seed in range(12):
        table = np.random.default_rng(seed).normal(0, 1.5, (V, V, V)).astype(np.float32)
        table[..., ENDS] += 4 * (seed % 3 == 2)  # every likely token ends
        for rule in itertools.product((-1.0, 0.0, 1.0, 2.0), (False, True, "never")):
            rows, counts = jax.device_get(searched(table, Beams(BEAMS, *rule).ranking(NEW), limits))
            for row, count, prompt in zip(rows, counts, PROMPTS, strict=True):
                start = len(prompt)
                got = [x[start : start + n].tolist() for x, n in zip(row, count, strict=True)]
                assert got == defined(np.float64(table), prompt, *rule, limits), (seed, rule)
                answers.add((seed, start, str(got)))
    assert len(answers) > 60  # rules do make a difference
