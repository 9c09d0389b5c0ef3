"""Beam search on the device, with the scores and the stopping rules of transformers' generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mmjax.generate.constraints import Constraints
from mmjax.types import MMJaxError

# The score of what is no candidate. Finite, as in transformers: where constraints forbid every
# token (-inf), such a row still ranks below the empty beams and never turns into a NaN.
NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Beams:
    """How many beams a prompt has, how ended ones are ranked, and when its search stops.

    num_beams: 1 is no beam search. length_penalty: an ended beam's score is the sum of its log
        probabilities over (its new tokens, the end token among them) ** length_penalty.
    early_stopping: True stops as soon as num_beams have ended; False when the best running beam,
        ranked at its present length, is below the worst ended one; "never" ranks it at the
        greatest length when length_penalty is positive, so that no better beam is missed.
    num_return_sequences: how many ended beams each prompt gives back, the best first.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    def __post_init__(self):
        if self.num_beams < 1:
            raise MMJaxError(f"num_beams is {self.num_beams}; give at least 1")
        if self.early_stopping not in (False, True, "never"):
            raise MMJaxError(
                f'early_stopping is {self.early_stopping!r}; give False, True or "never"'
            )
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise MMJaxError(
                f"num_return_sequences is {self.num_return_sequences} with num_beams="
                f"{self.num_beams}; give 1 to num_beams, or more beams"
            )

    def ranking(self, most: int) -> Ranking:
        """Return the part that is data to the program, so that its values compile nothing anew."""
        lengths = np.arange(1, most + 1, dtype=np.float64)
        return Ranking(
            np.float32(lengths**self.length_penalty),
            np.bool_(self.early_stopping is True),
            np.bool_(self.early_stopping == "never" and self.length_penalty > 0),
        )


class Ranking(NamedTuple):
    """divisors: float32[most], of scores by length - 1. first, longest: the stopping rule."""

    divisors: Any
    first: Any
    longest: Any


class _State(NamedTuple):
    """Running beams and ended ones, each n a prompt, the best first. w is the cache's room."""

    step: Array  # how many new tokens the running beams have
    running: Array  # int32[b, n, w], prompt and new tokens
    scores: Array  # float32[b, n], sums of log probabilities
    parents: Array  # int32[b, n], which beam of the step before each continues
    ended: Array  # int32[b, n, w]
    ended_scores: Array  # float32[b, n], divided by the length penalty
    counts: Array  # int32[b, n], new tokens of the ended without the end token
    full: Array  # bool[b, n], is this place taken by an ended beam?
    open: Array  # bool[b], can a prompt's answer still change?


def search(
    decode: Callable[[Array, Any], tuple[Array, Any]],
    logits: Array,
    cache: Any,
    history: Array,
    lengths: Array,
    real: Array,
    max_new: Array,
    ends: Array,
    beams: Beams,
    ranking: Ranking,
    constraints: Constraints,
) -> tuple[Array, Array]:
    """Return (rows int32[b, r, w], counts int32[b, r]): each prompt's r best, and their new tokens.

    decode: (tokens int32[b * n], cache) -> (logits [b * n, v], cache). logits: float32[b, v], after
    the prompts. cache: filled with the prompts, n rows each. history: int32[b, w], the prompts.
    real: bool[b], rows that are no padding.
    """
    b, w = history.shape
    n = beams.num_beams
    # With one more than all end tokens a beam, n of the candidates do not end, whatever comes.
    keep = max(2, 1 + ends.shape[0]) * n

    def advance(state: _State, logits: Array) -> _State:
        at = lengths + state.step
        scores = constraints(
            jax.nn.log_softmax(logits), state.running.reshape(b * n, w), jnp.repeat(at, n),
            state.step, ends,
        )  # fmt: skip
        v = scores.shape[-1]
        scores = scores.reshape(b, n, v) + state.scores[:, :, None]
        scores, index = jax.lax.top_k(scores.reshape(b, n * v), keep)
        parents, tokens = index // v, index % v
        rows = _pick(state.running, parents)
        rows = jnp.where(jnp.arange(w) == at[:, None, None], tokens[:, :, None], rows)
        step = state.step + 1
        end = jnp.isin(tokens, ends)
        over = end | (step == max_new)

        running_scores, best = jax.lax.top_k(scores + jnp.where(over, NEVER, 0.0), n)

        # Only the first n candidates may end; the others are there to keep n beams running.
        ending = over & (jnp.arange(keep) < n) & state.open[:, None]
        ended_scores = jnp.where(ending, scores / ranking.divisors[step - 1], NEVER)
        counts = step - end.astype(jnp.int32)
        both = (
            jnp.concatenate([state.ended, rows], axis=1),
            jnp.concatenate([state.counts, counts], axis=1),
            jnp.concatenate([state.full, ending], axis=1),
        )
        ended_scores = jnp.concatenate([state.ended_scores, ended_scores], axis=1)
        ended_scores, first = jax.lax.top_k(ended_scores, n)
        ended, counts, full = (_pick(x, first) for x in both)

        all_full = jnp.all(full, axis=1)
        length = jnp.where(ranking.longest, max_new, step)
        hope = running_scores[:, 0] / ranking.divisors[length - 1]
        better = hope > jnp.where(all_full, ended_scores[:, -1], NEVER)
        return _State(
            step,
            _pick(rows, best),
            running_scores,
            _pick(parents, best),
            ended,
            ended_scores,
            counts,
            full,
            state.open & better & ~(all_full & ranking.first),
        )

    def going(carry):
        state, _ = carry
        return (state.step < max_new) & jnp.any(state.open)

    def body(carry):
        state, cache = carry
        cache = cache.take((jnp.arange(b)[:, None] * n + state.parents).reshape(-1))
        at = (lengths + state.step - 1)[:, None, None]
        tokens = jnp.take_along_axis(state.running, at, axis=2).reshape(-1)
        logits, cache = decode(tokens, cache)
        return advance(state, logits), cache

    history = jnp.repeat(history[:, None], n, axis=1)
    # All beams of a prompt are alike at first, so only one of them has candidates.
    scores = jnp.full((b, n), NEVER).at[:, 0].set(0.0)
    start = _State(
        jnp.int32(0), history, scores, jnp.zeros((b, n), jnp.int32),
        history, jnp.full((b, n), NEVER), jnp.zeros((b, n), jnp.int32),
        jnp.zeros((b, n), bool), real,
    )  # fmt: skip
    carry = advance(start, jnp.repeat(logits, n, axis=0)), cache
    state, _ = jax.lax.while_loop(going, body, carry)
    r = beams.num_return_sequences
    return state.ended[:, :r], state.counts[:, :r]


def _pick(x: Array, index: Array) -> Array:
    """Return x [b, n, ...] at index, int32[b, m], of its second axis."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
